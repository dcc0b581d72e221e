"""Batches for stage 1: pictures, and the seed of the noise that belongs to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...utils.seeds import sample_seed
from ..plain_rows import FollowsEpoch, complete_row


class VisualTokenizerDataCollator(FollowsEpoch):
    """Makes batches for [`LavitVisualTokenizerForPreTraining`]; `Trainer` needs `remove_unused_columns=False` for it.

    Args:
        image_processor: Prepares the images, such as a [`LavitImageProcessor`] or that of the vision encoder.
        seed: Seed of the training. With a row's epoch and sample id it decides which noise an image gets.
    """

    def __init__(self, image_processor: Any, seed: int = 0):
        super().__init__()
        self.image_processor = image_processor
        self.seed = seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Rows of a [`TrainingDataset`], each with one image or several, or of any dataset with a column
                `image`. The latter are numbered by their content, and get their epoch from [`EpochCallback`].

        Returns:
            `pixel_values` `[images, channels, height, width]` and `sample_seeds` `[images]`.

        Raises:
            ValueError: If a row has no image.
        """
        images, seeds = [], []
        for row in (complete_row(row, self.epoch) for row in rows):
            if not row.get("images"):
                raise ValueError(
                    f"Sample {row['sample_id']} has no image to learn from. Give the dataset's image column to "
                    "TrainingDataset, and leave out rows of text alone."
                )
            for index, image in enumerate(row["images"]):
                images.append(image)
                seeds.append(sample_seed(self.seed, row["epoch"], row["sample_id"], f"gumbel/{index}"))
        pixel_values = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "sample_seeds": torch.tensor(seeds)}


__all__ = ["VisualTokenizerDataCollator"]
