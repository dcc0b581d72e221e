"""Pictures of a training: what a model makes of some of them after every evaluation, as files and in trackers.

`Trainer` sends numbers to whatever `report_to` names, and no pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..pipelines.image_to_text import CAPTION, first_sentence, generate_text, merge_options
from ..utils.atomic_files import complete_file
from ..utils.contact_sheet import Panel, contact_sheet
from ..utils.patch_pictures import fit_panel, grey_out_dropped, patch_grid

if TYPE_CHECKING:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..processing.processing_lavit import ImageTextProcessor

FOLDER = "validation"
_PER_ROW = 4


def show_picture(image: Image.Image, output_dir: str | Path, step: int, callbacks: Iterable[TrainerCallback]) -> None:
    """Saves a picture of a training, and shows it to the trackers that take pictures: TensorBoard, trackio and W&B.

    Args:
        image: The picture.
        output_dir: That of the training; the file is `validation/step-N.png` there.
        step: Updates so far.
        callbacks: Those of the trainer.
    """
    path = Path(output_dir, FOLDER, f"step-{step:07d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as file:
        image.save(file, format="PNG")
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(FOLDER, np.asarray(image), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            import wandb  # type: ignore[import-not-found]

            if wandb.run is not None:
                wandb.run.log({FOLDER: wandb.Image(image), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio  # type: ignore[import-not-found]

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({FOLDER: trackio.Image(image), "train/global_step": step})


class ValidationPictures(TrainerCallback):
    """Shows after every evaluation what a model makes of some pictures.

    Args:
        draw: Makes one picture of the model and theirs, such as [`draw_captions`] or [`draw_kept_patches`].
    """

    def __init__(self, draw: Callable[[Any], Image.Image]):
        self.draw = draw
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> ValidationPictures:
        """Makes this the last callback of `trainer`, whose trackers it needs; returns it."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A sharded model writes only if all processes do.
        trainer = self._trainer
        if trainer is None or not state.is_world_process_zero:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        model = kwargs["model"]
        is_training = model.training
        model.eval()
        with torch.no_grad():
            image = self.draw(model)
        model.train(is_training)
        assert args.output_dir is not None  # it has a default
        show_picture(image, args.output_dir, state.global_step, trainer.callback_handler.callbacks)


def draw_captions(
    model: LavitForConditionalGeneration, processor: ImageTextProcessor, images: Sequence[Image.Image]
) -> Image.Image:
    """Pictures with what a language model says about them; also one with adapters."""
    options = merge_options(model, CAPTION, {"num_beams": 1})
    del options["length_penalty"]  # of a search
    texts = generate_text(model, processor, images, [""] * len(images), options)
    panels = [Panel(first_sentence(text), fit_panel(image)) for text, image in zip(texts, images, strict=True)]
    return _sheet(panels)


def draw_kept_patches(model: Any, image_processor: Any, images: Sequence[Image.Image]) -> Image.Image:
    """Pictures with the patches in grey that a visual tokenizer, or a model that has one, drops."""
    tokenizer = model.visual_tokenizer
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"].to(tokenizer.device)
    masks = tokenizer.encode(pixel_values).keep_mask.cpu()
    grid = patch_grid(tokenizer.config.num_patches, tokenizer.config.image_size)
    return _sheet(
        [
            Panel(f"{int(mask.sum())} of {len(mask)} patches", grey_out_dropped(fit_panel(image), mask, grid))
            for mask, image in zip(masks, images, strict=True)
        ]
    )


def first_pictures(samples: Any, count: int) -> list[Image.Image]:
    """The first pictures of a dataset, in RGB.

    Args:
        samples: A [`TrainingDataset`].
        count: How many.
    """
    found: list[Image.Image] = []
    for index in range(len(samples)):
        found += [image.convert("RGB") for image in samples[index].get("images") or ()]
        if len(found) >= count:
            break
    return found[:count]


def _sheet(panels: Sequence[Panel]) -> Image.Image:
    return contact_sheet([panels[start : start + _PER_ROW] for start in range(0, len(panels), _PER_ROW)])


__all__ = ["ValidationPictures", "draw_captions", "draw_kept_patches", "first_pictures", "show_picture"]
