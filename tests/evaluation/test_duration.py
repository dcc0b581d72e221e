"""How long a benchmark takes is estimated from sizes."""

import pytest
import torch

from lavit_hf.evaluation import EvaluatedCheckpoint, EvaluationData, read_data
from lavit_hf.evaluation.duration import estimate_hours, flop_per_sample, format_hours, multiply_speed
from lavit_hf.evaluation.tasks import CaptionTask, TextToImageTask, VqaTask


def count(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_reading_and_writing(evaluated: EvaluatedCheckpoint) -> None:
    model = evaluated.model
    language = count(model.model.language_model, model.lm_head) - count(model.get_input_embeddings())
    patches = model.config.visual_tokenizer_config.num_patches
    data = EvaluationData("any", None, [], is_benchmark=True)
    vision = 2 * count(model.visual_tokenizer) * patches
    assert flop_per_sample(evaluated, CaptionTask(data)) == vision + 2 * language * (patches + 30 + 2 * 36)
    answers = VqaTask(data, {"num_image_tokens": 5})
    assert flop_per_sample(evaluated, answers) == vision + 2 * language * (5 + 30 + 5 * 10)


def test_drawing(evaluated: EvaluatedCheckpoint) -> None:
    data = read_data("scenes", "text-to-image", num_samples=1)
    model, unet = evaluated.model, evaluated.pipeline("lowres").unet
    language = count(model.model.language_model, model.lm_head) - count(model.get_input_embeddings())
    task = TextToImageTask(data, {"decoder": "lowres", "num_inference_steps": 7})
    assert flop_per_sample(evaluated, task) == 2 * (2 * language * 100 + 800 * count(unet) * 7)


def test_hours(evaluated: EvaluatedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    task = CaptionTask(read_data("scenes", "caption", num_samples=10))
    speed = flop_per_sample(evaluated, task) / 22.5  # at a quarter of it, a sample takes 90 seconds
    monkeypatch.setattr("lavit_hf.evaluation.duration.multiply_speed", lambda *_: speed)
    assert estimate_hours(evaluated, task) == pytest.approx(10 * 90 / 3600)
    assert estimate_hours(evaluated, task, num_processes=5) == pytest.approx(2 * 90 / 3600)
    assert [format_hours(hours) for hours in (0.0001, 0.25, 13.24)] == ["less than a minute", "15 min", "13.2 hours"]


def test_speed_is_that_of_this_device() -> None:
    assert 1e8 < multiply_speed(torch.device("cpu"), torch.float32, repetitions=1) < 1e15
