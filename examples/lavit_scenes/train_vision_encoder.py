"""Trains a small vision encoder on scenes: what LaVIT takes from EVA-CLIP, this one learns from labels of patches.

    python examples/lavit_scenes/train_vision_encoder.py --config examples/lavit_scenes/vision_encoder.json \
        --output_dir out/lavit-scenes/vision_encoder --max_steps 2000

From the features of every patch, linear layers (thrown away afterwards) have to tell the shape, color, size and place
of the object there, the place of the patch, and to paint it again. Of the patches that become tokens nothing but their
features tells a language model where they were. Half of the pictures are shown in colors that no scene has, so that
shapes are learned apart from colors: pairs of both that are held out, and are never shown here, need that.
`--output_dir` gets the encoder, for `train_tokenizer.py --vision_model`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, HfArgumentParser, Trainer, TrainingArguments

from lavit_hf import LavitImageProcessorPil
from lavit_hf.data.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    label_patches,
    object_coverage,
    render,
    sample_scene,
)
from lavit_hf.training import (
    CheckpointCallback,
    build_vision_model,
    exit_on_write_errors,
    find_trainer_checkpoint,
    sample_seed,
    sample_uniform,
)

_IGNORED = -100
_TRAINED = "with_heads.safetensors"  # the encoder and the layers that read its features
_OTHER = 60.0  # distance in RGB from which on a color is another one


@dataclass
class EncoderArguments:
    """What to train."""

    config: str = field(metadata={"help": "A JSON file with `model_type` and sizes of the encoder."})
    num_scenes: int = field(default=40_000, metadata={"help": "How many scenes to train on."})
    num_eval_scenes: int = field(default=500, metadata={"help": "How many scenes to evaluate on, of either split."})
    repaint_probability: float = field(default=0.5, metadata={"help": "How often a picture gets other colors."})
    position_weight: float = field(default=0.0, metadata={"help": "Weight of telling where a patch is."})
    init_from: str | None = field(default=None, metadata={"help": "A directory of this script, to go on from."})


@dataclass
class EncoderTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warmup, or below 1 their share."})
    weight_decay: float = field(default=0.02, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pictures per batch."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Pictures per batch of evaluation."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two reports."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: labels have names of their own."})
    label_names: list[str] = field(default_factory=lambda: ["shape", "color", "size"], metadata={"help": "Leave it."})


class LabeledScenes(Dataset):
    """Pictures with labels of their patches, made when they are read.

    Args:
        split: A split of scenes.
        num_scenes: How many.
        image_size: Width and height in pixels.
        patches_per_side: Patches across and down.
        repaint_probability: How often a picture gets other colors, without labels of these.
    """

    def __init__(
        self, split: str, num_scenes: int, image_size: int, patches_per_side: int, repaint_probability: float = 0.0
    ) -> None:
        self.split, self.num_scenes = split, num_scenes
        self.image_size, self.patches_per_side = image_size, patches_per_side
        self.repaint_probability = repaint_probability

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = sample_scene(self.split, 0, index)
        labels = label_patches(scene, self.patches_per_side)
        if sample_uniform(0, 0, index, "repaint") < self.repaint_probability:
            image = repaint(scene, self.image_size, np.random.default_rng(sample_seed(0, 0, index, "colors")))
            color = np.full_like(labels.color, _IGNORED)
        else:
            image, color = render(scene, self.image_size), labels.color
        values = {"shape": labels.shape, "color": color, "size": labels.size}
        return {"image": image, "offset": torch.tensor(labels.offset).float()} | {
            name: torch.tensor(value) for name, value in values.items()
        }


def repaint(scene: Scene, image_size: int, random: np.random.Generator) -> Image.Image:
    """Draws a scene in colors that are far from all that scenes have, and so shows no pair that is held out."""
    known = np.array([*COLORS.values(), *BACKGROUNDS.values()])
    pixels = np.empty((image_size, image_size, 3))
    pixels[:] = background = _other_color(random, known)
    for coverage in object_coverage(scene, image_size):
        color = _other_color(random, np.vstack([known, background]))
        pixels += coverage[:, :, None] * (color - pixels)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _other_color(random: np.random.Generator, known: np.ndarray) -> np.ndarray:
    while True:
        color = random.uniform(0, 255, 3)
        if np.linalg.norm(known - color, axis=1).min() > _OTHER:
            return color


class LabeledSceneCollator:
    """Batches of pictures as the encoder takes them, and of labels."""

    def __init__(self, image_processor: LavitImageProcessorPil) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "image"}
        images = [row["image"] for row in rows]
        return batch | {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}


class VisionEncoderForScenes(nn.Module):
    """A vision encoder and the linear layers that read its features.

    Args:
        vision_model: A vision transformer that returns its raw residual stream.
        position_weight: Weight of telling the row and the column of a patch.
    """

    def __init__(self, vision_model: Any, position_weight: float) -> None:
        super().__init__()
        self.position_weight = position_weight
        self.vision_model = vision_model
        config = vision_model.config
        self.patch_size = config.patch_size
        self.classes = {"shape": len(SHAPES) + 1, "color": len(COLORS) + len(BACKGROUNDS), "size": len(SIZES) + 1}
        self.side = config.image_size // config.patch_size
        self.num_outputs = [*self.classes.values(), 2, 3 * self.patch_size**2, self.side, self.side]
        self.head = nn.Linear(config.hidden_size, sum(self.num_outputs))

    def forward(
        self,
        pixel_values: torch.Tensor,
        shape: torch.Tensor,
        color: torch.Tensor,
        size: torch.Tensor,
        offset: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: Preprocessed pictures, `[batch, 3, height, width]`.
            shape: Labels, `[batch, num_patches]`, as `color` and `size`.
            color: -100 where it cannot be seen.
            size: Labels.
            offset: Where the object's middle is, `[batch, num_patches, 2]`.

        Returns:
            The loss, and which of the patches' classes were found, `[batch, num_patches]` each.
        """
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        outputs = self.head(F.layer_norm(features, features.shape[-1:])).split(self.num_outputs, dim=-1)
        *logits, place, pixels, row, column = outputs
        targets = dict(zip(self.classes, (shape, color, size), strict=True))
        loss = F.mse_loss(pixels, self.patches(pixel_values))
        loss = loss + self.position_weight * self.position_loss(row, column)
        is_object = (shape != len(SHAPES))[..., None]
        loss = loss + 4 * (F.smooth_l1_loss(place, offset, reduction="none", beta=0.1) * is_object).mean()
        found = {}
        for values, (name, target) in zip(logits, targets.items(), strict=True):
            loss = loss + F.cross_entropy(values.transpose(1, 2), target, ignore_index=_IGNORED)
            found[name] = values.argmax(dim=-1)
        return {"loss": loss, **found}

    def position_loss(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """How well scores of rows and columns, `[batch, num_patches, side]` each, tell where patches are."""
        number = torch.arange(self.side**2, device=row.device).expand(len(row), -1)
        losses = [
            F.cross_entropy(scores.transpose(1, 2), target)
            for scores, target in ((row, number // self.side), (column, number % self.side))
        ]
        return losses[0] + losses[1]

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of every patch, `[batch, num_patches, 3 * patch_size ** 2]`."""
        return F.unfold(pixel_values, self.patch_size, stride=self.patch_size).transpose(1, 2)


def accuracies(prediction: Any) -> dict[str, float]:
    """How often the labels of patches with an object are found."""
    shape = prediction.label_ids[0]
    is_object = shape != len(SHAPES)
    names = ("shape", "color", "size")
    return {
        name: float((found == label)[is_object].mean())
        for name, found, label in zip(names, prediction.predictions, prediction.label_ids, strict=True)
    }


def complete_model(vision_model: Any) -> Any:
    """The encoder with its last normalization, which LaVIT leaves out, but which `from_pretrained` expects."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what was not trained, such as a pooler, is the same in every run
        complete = type(vision_model)(vision_model.config)
    complete.load_state_dict({**complete.state_dict(), **vision_model.state_dict()})
    return complete


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains; returns the trainer."""
    parser = HfArgumentParser((EncoderArguments, EncoderTrainingArguments), description=__doc__)
    encoder_args, args = parser.parse_args_into_dataclasses(arguments)
    if args.label_smoothing_factor:
        raise SystemExit("--label_smoothing_factor does nothing here: Trainer smooths labels of one kind only.")
    checkpoint = find_trainer_checkpoint(args.resume_from_checkpoint, args.output_dir)
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(**json.loads(Path(encoder_args.config).read_text(encoding="utf-8")))
    side = config.image_size // config.patch_size
    image_processor = LavitImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    evaluated = {
        split: LabeledScenes(split, encoder_args.num_eval_scenes, config.image_size, side)
        for split in ("validation", "held_out")
    }
    model = VisionEncoderForScenes(build_vision_model(config), encoder_args.position_weight)
    if encoder_args.init_from is not None:
        model.load_state_dict(load_file(Path(encoder_args.init_from) / _TRAINED))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=LabeledScenes(
            "train", encoder_args.num_scenes, config.image_size, side, encoder_args.repaint_probability
        ),
        eval_dataset=evaluated,
        data_collator=LabeledSceneCollator(image_processor),
        compute_metrics=accuracies,
        callbacks=[CheckpointCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        complete_model(trainer.model.vision_model).save_pretrained(args.output_dir)
        save_file(trainer.model.state_dict(), Path(args.output_dir) / _TRAINED)
        image_processor.save_pretrained(args.output_dir)
    return trainer


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
