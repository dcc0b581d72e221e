"""Batches of pictures alone, and how a picture is cut out of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from ...pipelines.pixel_decoder_inputs import resolve_size
from ...utils.seeds import sample_seed
from ..plain_rows import complete_row

Box = tuple[int, int, int, int]


def only_image(row: Mapping[str, Any]) -> PIL.Image.Image:
    """The one image of a sample.

    Raises:
        ValueError: If it has none, or several.
    """
    images = row.get("images") or []
    if len(images) != 1:
        raise ValueError(f"Sample {row['sample_id']} has {len(images)} images; training needs exactly one to draw.")
    return images[0]


def center_box(image: PIL.Image.Image, height: int, width: int) -> Box:
    """The largest box of that shape around the center: left, top, right, bottom."""
    box_width = min(image.width, max(round(image.height * width / height), 1))
    box_height = min(image.height, max(round(image.width * height / width), 1))
    left, top = (image.width - box_width) // 2, (image.height - box_height) // 2
    return left, top, left + box_width, top + box_height


def sample_columns(rows: Sequence[Mapping[str, Any]], seed: int, purpose: str) -> dict[str, torch.Tensor]:
    """Which samples a batch has, and their seeds: `sample_ids` and `sample_seeds`, both `[batch]`."""
    seeds = [sample_seed(seed, row["epoch"], row["sample_id"], purpose) for row in rows]
    return {"sample_ids": torch.tensor([row["sample_id"] for row in rows]), "sample_seeds": torch.tensor(seeds)}


class ImageDataCollator:
    """Makes batches of rows `{"images": [image], "sample_id": ..., "epoch": ...}`, cut around their center.

    Args:
        height: Height of the pictures, in pixels.
        width: Their width.
        multiple: What both have to be a multiple of.
        seed: Seed of the training.

    Raises:
        ValueError: If a size is no multiple, and later for rows without exactly one image.
    """

    def __init__(self, height: int, width: int, multiple: int, seed: int = 0):
        self.height, self.width = resolve_size(height, width, None, height, multiple)
        self.seed = seed
        self.processor = VaeImageProcessor(vae_scale_factor=multiple)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Rows of a [`TrainingDataset`], or of any dataset with a column `image`.

        Returns:
            `pixel_values` in [-1, 1], `[batch, 3, height, width]`; `sample_ids` and `sample_seeds`, `[batch]`.
        """
        rows = [complete_row(row) for row in rows]
        images = [only_image(row) for row in rows]
        crops = [image.crop(center_box(image, self.height, self.width)) for image in images]
        pixels = self.processor.preprocess(crops, self.height, self.width)
        return {"pixel_values": pixels, **sample_columns(rows, self.seed, "images")}


__all__ = ["Box", "ImageDataCollator", "center_box", "only_image", "sample_columns"]
