"""`lavit publish` and `lavit export-llama`; tests/hub has what they do."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from lavit_hf import hub
from lavit_hf.hub import PublishReport


def test_dry_run_lists_files_and_sizes(lavit, random_checkpoint: Path) -> None:
    result = lavit("publish", random_checkpoint, "me/tiny", "--dry-run", "--base-model", "a/b")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    size = (random_checkpoint / "model.safetensors").stat().st_size
    assert f"{size / 1e6:>8.1f} MB  model.safetensors" in lines
    assert {line.split()[-1] for line in lines} >= {
        "README.md",
        "NOTICE",
        "modeling_lavit.py",
        "lowres/model_index.json",
    }
    assert lines[-1].startswith(f"Would publish me/tiny: {len(lines) - 1} files, ")
    assert result.stderr == "The card names no datasets (--dataset).\n"


def test_dry_run_says_what_is_left_out_and_why(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))
    for name in ("id_rsa", "notes.txt", "wandb/run/log.txt", "wandb/run/summary.json", "unet/optimizer.PT"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("0")
    lines = lavit("publish", folder, "me/tiny", "--dry-run").stdout.splitlines()
    assert [line.strip() for line in lines if "left out" in line] == [
        "left out  id_rsa: a key, token or password by its name; never published",
        "left out  notes.txt: not part of a checkpoint; --include publishes it",
        "left out  unet/optimizer.PT: a pickle, which can run code; never published",
        "left out  wandb/ (2 files): not part of a checkpoint; --include publishes it",
    ]


def test_card_can_be_seen_before(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("publish", random_checkpoint, "me/tiny", "--dry-run", "--card", "--dataset", "a/b")
    assert result.exit_code == 0, result.output
    card = ModelCard(result.stdout)
    assert card.data.datasets == ["a/b"] and 'repository = "me/tiny"' in card.text
    assert "Would publish" not in result.stdout and "base_model" in result.stderr
    refused = lavit("publish", random_checkpoint, "me/tiny", "--card")
    assert refused.exit_code == 1 and "--dry-run" in refused.stderr


def test_options_and_report(lavit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    calls = []

    def fake(checkpoint, repository, **options):
        calls.append((checkpoint, repository, options))
        return PublishReport(repository, {"a": 2000, "b": 1}, ["old.safetensors"], {}, ["A hint."], "http://x", "abc")

    monkeypatch.setattr(hub, "publish", fake)
    options = ["--private", "--license", "mit", "--dataset", "c/d", "--dataset", "e/f", "--revision", "next"]
    options += ["--include", "docs/*", "--include-evaluation"]
    result = lavit("publish", folder, "me/tiny", *options)
    expected = {"private": True, "dry_run": False, "license": "mit", "base_models": [], "datasets": ["c/d", "e/f"]}
    expected |= {"include": ["docs/*"], "include_evaluation": True}
    assert calls == [(folder, "me/tiny", {**expected, "revision": "next"})]
    assert result.stdout.splitlines() == [
        "Published http://x (2 files, 2.0 KB, commit abc)",
        "Removed old.safetensors, which this version does not have",
    ]
    assert result.stderr == "A hint.\n"
    lavit("publish", folder, "me/tiny")
    assert calls[-1][2]["private"] is None  # what is usual for the owner


def test_a_space_of_another_branch_is_refused(lavit, monkeypatch: pytest.MonkeyPatch, random_checkpoint: Path) -> None:
    """Regression: the page of such a Space loaded the branch main."""
    command = ["publish", random_checkpoint, "me/tiny", "--space", "me/page"]
    with monkeypatch.context() as patch:
        for name in ("publish", "publish_space"):
            patch.setattr(hub, name, lambda *_, **options: pytest.fail("published"))
        result = lavit(*command, "--revision", "next")
    assert result.exit_code == 1 and "--space cannot be given with --revision next" in result.stderr
    assert lavit(*command, "--revision", "main", "--dry-run").exit_code == 0


def test_export_llama(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("export-llama", random_checkpoint, tmp_path / "llama", "--max-shard-size", "100KB")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "llama") in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.vocab_size == 366


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "{empty}", "me/x"], "config.json"),
        (["publish", "{empty}/nowhere", "me/x"], "nowhere does not exist"),
        (["publish", "{checkpoint}", "x"], "user/name"),
        (["export-llama", "{empty}", "{empty}/new"], "config.json"),
        (["export-llama", "{checkpoint}", "{checkpoint}"], "not empty"),
    ],
)
def test_errors(lavit, arguments: list[str], message: str, random_checkpoint: Path, tmp_path: Path) -> None:
    result = lavit(*(argument.format(empty=tmp_path, checkpoint=random_checkpoint) for argument in arguments))
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("lavit: error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
