"""The vision encoder of lavit-scenes."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "lavit_scenes"


def test_label_smoothing_is_refused(monkeypatch, tmp_path):
    """`Trainer` would apply it to nothing, and fails in other ways."""
    monkeypatch.syspath_prepend(FOLDER)
    main = importlib.import_module("train_vision_encoder").main
    with pytest.raises(SystemExit, match="--label_smoothing_factor does nothing here"):
        main(["--output_dir", str(tmp_path), "--config", "vision_encoder.json", "--label_smoothing_factor", "0.1"])
