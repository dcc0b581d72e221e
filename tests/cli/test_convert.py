"""`lavit convert`, and the checkpoint in the repository."""

import filecmp
import json
import runpy
from pathlib import Path

import pytest
import transformers

HEADS = "vision=4,merger=4,decoder=4"
ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_there_and_back(lavit, original_dir: Path, tmp_path: Path, checkpoint: Path) -> None:
    converted, back = tmp_path / "converted", tmp_path / "back"
    result = lavit("convert", original_dir, converted, "--heads", HEADS)
    assert result.exit_code == 0, result.output
    assert str(converted) in result.stdout
    assert files(converted) == files(checkpoint)
    result = lavit("convert", "--to-original", converted, back)
    assert result.exit_code == 0, result.output
    assert "visual_tokenizer/eva_vitg_psz14.bin" in files(back)


def test_options_reach_the_converter(lavit, original_dir: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    options = ["--heads", HEADS, "--dtype", "bfloat16", "--max-shard-size", "400KB"]
    result = lavit("convert", original_dir, converted, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list(converted.glob("model-*.safetensors"))) > 1


def test_plan(lavit) -> None:
    result = lavit("convert", "--plan", ROOT / "tests" / "data" / "published-7b-manifest.json")
    assert result.exit_code == 0, result.output
    assert "Every tensor has its place" in result.stdout


def test_plan_names_gaps_in_one_line(lavit, tmp_path: Path) -> None:
    manifest = json.loads((ROOT / "tests" / "data" / "published-7b-manifest.json").read_text())
    for entry in manifest["files"].values():
        entry["tensors"] = {name: shape for name, shape in entry["tensors"].items() if "causal_encoder" not in name}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    result = lavit("convert", "--plan", path)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "causal_encoder" in result.stderr or "merger" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SRC and DST"),
        (["{original}"], "SRC and DST"),
        (["{original}", "{new}"], "--heads"),
        (["{original}", "{new}", "--heads", "vision=3,merger=4,decoder=4"], "vision=3"),
        (["{original}", "{new}", "--heads", "ears=2"], "ears"),
        (["{original}", "{new}", "--heads", HEADS, "--max-shard-size", "much"], "much"),
        (["{original}", "{full}", "--heads", HEADS], "not empty"),
        (["{full}", "{new}"], "language_model"),
        (["{full}/nothing", "{new}"], "nothing"),
        (["--to-original", "{original}", "{new}"], "tiny-original"),
        (["--to-original", "{original}", "{new}", "--dtype", "float16"], "--dtype"),
        (["--plan", "{full}/file", "{original}"], "--plan"),
        (["--plan", "{full}/nothing"], "nothing"),
        (["--plan", "{full}/file"], "file"),
    ],
)
def test_errors(lavit, arguments: list[str], message: str, original_dir: Path, tmp_path: Path) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "file").write_text("something")
    result = lavit("convert", *(argument.format(original=original_dir, full=full, new=new) for argument in arguments))
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("lavit: error: ")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_committed_checkpoint_is_a_fresh_conversion(tmp_path: Path, random_checkpoint: Path) -> None:
    fresh = tmp_path / "fresh"
    runpy.run_path(str(ROOT / "checkpoints" / "build_tiny_random.py"))["build"](fresh)
    assert files(fresh) == files(random_checkpoint)
    # Another version of transformers may write other defaults into a configuration, never other weights.
    written_by = json.loads((random_checkpoint / "config.json").read_text())["transformers_version"]
    names = [name for name in files(fresh) if written_by == transformers.__version__ or not name.endswith(".json")]
    assert filecmp.cmpfiles(fresh, random_checkpoint, names, shallow=False) == (names, [], [])


def test_committed_checkpoint_is_small(random_checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in random_checkpoint.rglob("*") if path.is_file()) < 5_000_000


def test_verify(lavit, original_dir: Path, tmp_path: Path) -> None:
    result = lavit("verify", original_dir)
    assert result.exit_code == 0 and result.stdout == f"{original_dir} is complete.\n"
    result = lavit("verify", tmp_path)
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(line.startswith(f"{tmp_path}/") and "is missing." in line for line in lines)
    (tmp_path / "adapter_config.json").write_text("{}")
    result = lavit("verify", tmp_path)
    assert result.exit_code == 1 and "holds adapters of LoRA" in result.stderr and result.stderr.count("\n") == 1
    result = lavit("verify", tmp_path / "nowhere")
    assert result.exit_code == 1 and "does not exist" in result.stderr and not result.stdout
