"""The vision encoders of made worlds."""

import importlib
from pathlib import Path

import pytest
import torch

from lavit_hf.data.worlds import IGNORED

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "worlds"


def test_label_smoothing_is_refused(monkeypatch, tmp_path):
    """`Trainer` would apply it to nothing, and fails in other ways."""
    monkeypatch.syspath_prepend(FOLDER)
    main = importlib.import_module("train_vision_encoder").main
    sizes = ["--vision_config", "vision_encoder.json"]
    with pytest.raises(SystemExit, match="--label_smoothing_factor does nothing here"):
        main(["--output_dir", str(tmp_path), *sizes, "--label_smoothing_factor", "0.1"])


def test_patches_of_objects_count_as_much_as_all_others(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    model_class = importlib.import_module("train_vision_encoder").VisionEncoderForScenes
    is_object = torch.tensor([[True, False, False, False, False]])
    target = torch.tensor([[0, 1, 1, 1, IGNORED]])
    right = 20 * torch.nn.functional.one_hot(target.clamp_min(0), 2).float()
    for wrong, number in ((right.clone(), 0), (right.clone(), slice(1, 4))):
        wrong[0, number] = wrong[0, number].flip(-1)
        assert model_class.label_loss(None, wrong, target, is_object).item() == pytest.approx(20, abs=1e-3)
    wrong = right.clone()
    wrong[0, 4] = -wrong[0, 4]  # nobody asks
    assert model_class.label_loss(None, wrong, target, is_object).item() == pytest.approx(0, abs=1e-3)
    nothing = torch.zeros_like(is_object)
    assert model_class.label_loss(None, right, target, nothing).isfinite()
