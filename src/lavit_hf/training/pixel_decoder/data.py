"""Data of stage 3: samples with an image and its codes, how a picture is cut out of it, and batches of both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from ...pipelines.pipeline_lavit_pixel_decoder import LavitPixelDecoderPipeline, check_codes, resolve_size, rows_of_ids
from ...utils.seeds import sample_seed
from ..dataset import FollowsEpoch, TrainingDataset, complete_row


class PixelDecoderDataset(TrainingDataset):
    """A [`TrainingDataset`] of images without text.

    Args:
        dataset: A `datasets.Dataset`, or a sequence of dictionaries. A column `codes` holds a list of codes per image.
        image_column: Where the images are.
        on_bad_sample: As in [`TrainingDataset`].
        image_root: As in [`TrainingDataset`].
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        on_bad_sample: str = "skip",
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(dataset, image_column, text_column=None, on_bad_sample=on_bad_sample, image_root=image_root)
        if self.image_column != image_column:
            raise ValueError(f"The dataset has no column {image_column!r} for `image_column`: codes alone do not do.")


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


class ImageDataCollator(FollowsEpoch):
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
        super().__init__()
        self.height, self.width = resolve_size(height, width, None, height, multiple)
        self.seed = seed
        self.processor = VaeImageProcessor(vae_scale_factor=multiple)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Rows of a [`TrainingDataset`], or of any dataset with a column `image`. The latter are numbered by
                their content, and get their epoch from [`EpochCallback`].

        Returns:
            `pixel_values` in [-1, 1], `[batch, 3, height, width]`; `sample_ids` and `sample_seeds`, `[batch]`.
        """
        rows = [complete_row(row, self.epoch) for row in rows]
        images = [only_image(row) for row in rows]
        crops = [image.crop(center_box(image, self.height, self.width)) for image in images]
        pixels = self.processor.preprocess(crops, self.height, self.width)
        return {"pixel_values": pixels, **sample_columns(rows, self.seed, "images")}


class PixelDecoderDataCollator(FollowsEpoch):
    """Makes batches of rows `{"images": [image], "sample_id": ..., "epoch": ...}`, with `"codes": [[...]]` or without.

    Args:
        pipeline: The pixel decoder, a [`LavitPixelDecoderPipeline`]; gives what a size has to be a multiple of, and
            which codes there are.
        height: Height of the picture to draw, in pixels; by default that of the U-Net.
        width: Its width; by default that of the U-Net.
        image_processor: Prepares images for the visual tokenizer; not needed where rows have codes.
        seed: Seed of the training. With a row's epoch and sample id it decides what chance decides about the sample.
        original_sizes: Whether an SDXL U-Net is told how large an image was and where it was cropped, as SDXL was
            trained, so that it learns not to draw what small images look like enlarged. By default it is told what the
            pipeline tells it: the size to draw, uncropped.

    Images are cut to the shape of the picture around their center, for the tokenizer too: codes describe what is to be
    drawn. Where rows bring codes, nothing is cut: those were computed from the whole image, squashed.

    Raises:
        ValueError: If a size is no multiple, and later for rows without exactly one image, or with codes that the
            token decoder has no row or position for.
    """

    def __init__(
        self,
        pipeline: LavitPixelDecoderPipeline,
        height: int | None = None,
        width: int | None = None,
        image_processor: Any = None,
        seed: int = 0,
        original_sizes: bool = False,
    ):
        super().__init__()
        self.height, self.width = pipeline.resolve_size(height, width)
        self.image_processor = image_processor
        self.seed = seed
        self.original_sizes = original_sizes
        self.codebook_size = pipeline.token_decoder.config.codebook_size
        self.max_codes = pipeline.token_decoder.config.num_queries
        self.target_processor = VaeImageProcessor(vae_scale_factor=pipeline.vae_scale_factor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Rows of a [`TrainingDataset`], or of any dataset with a column `image`. The latter are numbered by
                their content, and get their epoch from [`EpochCallback`].

        Returns:
            `pixel_values`, the pictures in [-1, 1], `[batch, 3, height, width]`; `time_ids` `[batch, 6]`;
            `sample_ids` and `sample_seeds` `[batch]`; and either `codes` `[total]` with `num_tokens` `[batch]`, or
            `tokenizer_pixel_values`, the visual tokenizer's input.
        """
        rows = [complete_row(row, self.epoch) for row in rows]
        images = [only_image(row) for row in rows]
        coded = [row.get("codes") is not None for row in rows]
        if any(coded) and not all(coded):
            raise ValueError("Some images of a batch have codes and some have none; give codes for all or for none.")
        boxes = [(0, 0, *image.size) if coded[0] else center_box(image, self.height, self.width) for image in images]
        crops = [image.crop(box) for image, box in zip(images, boxes, strict=True)]
        batch = {
            "pixel_values": self.target_processor.preprocess(crops, self.height, self.width),
            "time_ids": torch.stack([self._time_ids(*pair) for pair in zip(images, boxes, strict=True)]),
            **sample_columns(rows, self.seed, "pixel_decoder"),
        }
        return {**batch, **(self._codes(rows) if coded[0] else self._tokenizer_inputs(crops))}

    def _time_ids(self, image: PIL.Image.Image, box: Box) -> torch.Tensor:
        """Original size, crop, size to draw; the crop in pixels of the picture, as SDXL counts it."""
        if not self.original_sizes:
            ids = [self.height, self.width, 0, 0, self.height, self.width]
        else:
            left, top, right, bottom = box
            crop = round(top * self.height / (bottom - top)), round(left * self.width / (right - left))
            ids = [image.height, image.width, *crop, self.height, self.width]
        return torch.tensor(ids, dtype=torch.float32)

    def _codes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        codes = []
        for row in rows:
            if len(row["codes"]) != 1:
                raise ValueError(
                    f"Sample {row['sample_id']} has codes of {len(row['codes'])} images; stage 3 draws exactly one."
                )
            name = f"codes of sample {row['sample_id']}"
            (image,) = rows_of_ids([row["codes"][0]], name)
            try:
                check_codes([image], self.codebook_size, self.max_codes)
            except ValueError as error:
                raise ValueError(f"Sample {row['sample_id']} does not fit the token decoder. {error}") from error
            codes.append(image)
        return {"codes": torch.cat(codes), "num_tokens": torch.tensor([len(image) for image in codes])}

    def _tokenizer_inputs(self, images: list[PIL.Image.Image]) -> dict[str, torch.Tensor]:
        if self.image_processor is None:
            raise ValueError(
                "The rows have no codes: pass an `image_processor` and train with a visual tokenizer, or tokenize the "
                "dataset first."
            )
        return {"tokenizer_pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
