"""`lavit publish` and `lavit export-llama`; tests/hub has what they do."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lavit_hf.cli import publish
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


def test_options_and_report(lavit, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(checkpoint, repository, **options):
        calls.append((checkpoint, repository, options))
        return PublishReport(repository, {"a": 2000, "b": 1}, ["old.safetensors"], [], ["A hint."], "http://x", "abc")

    monkeypatch.setattr(publish, "publish", fake)
    options = ["--private", "--license", "mit", "--dataset", "c/d", "--dataset", "e/f", "--revision", "next"]
    result = lavit("publish", "folder", "me/tiny", *options)
    expected = {"private": True, "dry_run": False, "license": "mit", "base_models": [], "datasets": ["c/d", "e/f"]}
    assert calls == [(Path("folder"), "me/tiny", {**expected, "revision": "next"})]
    assert result.stdout.splitlines() == [
        "Published http://x (2 files, 2.0 KB, commit abc)",
        "Removed old.safetensors, which this version does not have",
    ]
    assert result.stderr == "A hint.\n"
    lavit("publish", "folder", "me/tiny")
    assert calls[-1][2]["private"] is None  # what is usual for the owner


def test_export_llama(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("export-llama", random_checkpoint, tmp_path / "llama", "--max-shard-size", "100KB")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "llama") in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.vocab_size == 366


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "{empty}", "me/x"], "config.json"),
        (["publish", "{empty}/nowhere", "me/x"], "nowhere is not a directory"),
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
