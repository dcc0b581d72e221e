"""The ablation of a world, with few steps per variant: all are trained and measured, and none of them twice."""

import importlib
import json
from pathlib import Path

import pytest

from lavit_hf import default_checkpoint
from lavit_hf.hub.facts import world_of
from lavit_hf.modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer

HERE = Path(__file__).resolve().parents[2] / "examples" / "worlds"
FEW = [
    "--world",
    world_of(default_checkpoint()).name,
    "--tokenizer_steps",
    "8",
    "--caption_steps",
    "2",
    "--num_scenes",
    "8",
    "--num_drawings",
    "2",
]


def test_all_variants_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ablate = importlib.import_module("ablate")
    ablate.main(["--output_dir", str(tmp_path), *FEW])

    measured = json.loads((tmp_path / "ablation.json").read_text())
    tokenizers = measured["tokenizers"]
    assert list(tokenizers) == [
        *("dynamic", "all patches", "random", "dynamic, not quantized"),
        *("dynamic, random budgets", "learned, random budgets", "random, random budgets"),
    ]
    budgets = tokenizers["random, random budgets"]["budgets"]
    assert {name: row["tokens"] for name, row in budgets.items()} == {"4": 4, "8": 8, "16": 16, "32": 32, "64": 64}
    assert tokenizers["all patches"]["tokens"] == 64
    assert 8 < tokenizers["random"]["tokens"] < 40  # a third of 64
    assert all(0 <= row["patches_right"] <= 1 and row["cosine"] < 1 for row in tokenizers.values())
    assert len(measured["captions"]) == 8 and list(measured["guidance"]) == ["1", "2", "4"]
    assert len(measured["patches"]) == 6
    assert all(row["fully_right"]["n"] == 8 for row in measured["captions"].values())
    assert "| all patches | 64.0 |" in (tmp_path / "ablation.md").read_text()
    LavitVisualTokenizer.from_pretrained(tmp_path / "tokenizers" / "random")

    capsys.readouterr()
    ablate.main(["--output_dir", str(tmp_path), *FEW])
    assert "seconds" not in capsys.readouterr().out
    assert json.loads((tmp_path / "ablation.json").read_text()) == measured
