"""Pictures of trainings: in files, and in a real TensorBoard, beside the curves."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TrackioCallback

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.validation_pictures import draw_captions, draw_kept_patches, show_picture
from tiny_parts import CHECKPOINT, picture_rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMON = {
    "dataset": "scenes",
    "num_scenes": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "tensorboard",
    "disable_tqdm": True,
    "use_cpu": True,
}
EVALUATION = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 1}
STAGES = {
    "train_tokenizer": {
        **EVALUATION,
        "vision_model": CHECKPOINT,
        "num_eval_rows": 4,
        "codebook_size": 24,
        "codebook_dim": 6,
        "num_layers": 1,
        "from_scratch": True,
        "kmeans_tokens_per_code": 1,
        "per_device_train_batch_size": 8,
    },
    "train_lm": {**EVALUATION, "model": CHECKPOINT, "num_eval_rows": 4},
    "finetune_lora": {**EVALUATION, "model": CHECKPOINT},
    "train_pixel_decoder": {
        "pixel_decoder": CHECKPOINT,
        "visual_tokenizer": CHECKPOINT,
        "validation_split": "validation",
        "num_validation_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_shows_curves_and_pictures(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = {**COMMON, **STAGES[script], "output_dir": tmp_path / "out"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    importlib.import_module(script).main(arguments)
    files = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert files == ["step-0000001.png", "step-0000002.png"]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "eval/loss"} <= set(board.Tags()["scalars"])
    shown = board.Images("validation")
    assert {event.step for event in shown} == {1, 2}
    with Image.open(tmp_path / "out" / "validation" / files[0]) as image:
        assert (shown[0].width, shown[0].height) == image.size


def test_trackio_is_shown_pictures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    context = SimpleNamespace(current_run=SimpleNamespace(get=lambda: None))
    trackio = SimpleNamespace(context_vars=context, log=logged.append, Image=lambda image: image)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    callback = TrackioCallback.__new__(TrackioCallback)
    image = Image.new("RGB", (4, 2))
    show_picture(image, tmp_path, 3, [callback])
    assert not logged  # nothing runs yet
    context.current_run.get = lambda: "a run"
    show_picture(image, tmp_path, 7, [callback])
    assert logged == [{"validation": image, "train/global_step": 7}]
    assert len(list((tmp_path / "validation").iterdir())) == 2


def test_looking_changes_nothing() -> None:
    """Regression guard: whoever looks at a model draws no random numbers, and leaves it as it was."""
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).train()
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    pictures = [row["image"] for row in picture_rows(6) if row["image"] is not None]
    state = torch.get_rng_state()
    with torch.no_grad():
        sheet = draw_captions(model, processor, pictures)
        kept = draw_kept_patches(model, processor.image_processor, pictures)
    assert torch.equal(torch.get_rng_state(), state)
    assert sheet.height > 2 * 200 and kept.size[0] == sheet.size[0]  # two rows
