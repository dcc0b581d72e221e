"""Pictures for the examples that train on pictures alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lavit_hf.data.loading import load_data
from lavit_hf.data.scenes import make_scenes
from lavit_hf.training.pixel_decoder.dataset import PixelDecoderDataset


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(
        metadata={"help": "A folder of images, one of Dataset.save_to_disk, the name of a dataset, or 'scenes'."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split to validate on; by default none."})
    num_validation_rows: int = field(default=64, metadata={"help": "How many rows of it to use."})
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes': how many to train on."})
    height: int | None = field(default=None, metadata={"help": "Height of the pictures; by default the model's."})
    width: int | None = field(default=None, metadata={"help": "Width of the pictures; by default the model's."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about corrupt images: skip or raise."})


def load_training_data(data: DataArguments) -> PixelDecoderDataset:
    """Samples to train on."""
    return _load_samples(data, data.train_split, data.num_scenes)


def load_validation_rows(data: DataArguments) -> list[dict[str, Any]]:
    """Samples held out for validation."""
    if data.validation_split is None:
        return []
    samples = _load_samples(data, data.validation_split, data.num_validation_rows)
    return [samples[index] for index in range(min(len(samples), data.num_validation_rows))]


def _load_samples(data: DataArguments, split: str, num_scenes: int) -> PixelDecoderDataset:
    root = None
    if data.dataset == "scenes":
        rows = make_scenes(split, num_scenes=num_scenes)
    else:
        rows, root = load_data(data.dataset, split)
    return PixelDecoderDataset(rows, data.image_column, data.on_bad_sample, image_root=root)
