"""What every training stage reads its samples from: a dataset that knows its epoch and outlives bad samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..processing.processing_lavit import ImageTextProcessor
from .lengths import measure_lengths
from .sample_checks import check_sample, read_codes, read_messages, read_sample_id
from .sample_images import read_images, read_message_images

logger = logging.get_logger(__name__)

_ON_BAD_SAMPLE = ("skip", "raise")


class TrainingDataset(Dataset):
    """Samples of a `datasets.Dataset` (or of a list of dictionaries), ready for the collators of this package.

    A sample is `{"images": [RGB images], "text": str or None, "sample_id": int, "epoch": int}`. Rows that were
    tokenized before have `"codes"` (a list of codes per image) instead of `"images"`; `"prompt"` and `"messages"` are
    handed on if the dataset has such columns. `sample_id` is the row's index, or its column of this name.

    A sample is bad if an image cannot be decoded (of the column or of a message), if its text, or all that the
    assistant says, is missing or blank, or if the `<image>` placeholders in its text are not as many as its images.
    With `on_bad_sample="skip"` it is logged with its index, counted, and replaced by the next good one, the same in
    every run.

    With plain `Trainer`, add [`EpochCallback`] to the callbacks: accelerate calls `set_epoch` of a dataset in some
    situations only (not with several processes, nor in the epoch in which a run is resumed). A training loop of your
    own calls it before every epoch. Workers see the new epoch, persistent ones included.

    Args:
        dataset: A `datasets.Dataset`, or a sequence of dictionaries. Images need not be decoded before.
        image_column: Where the images are: one, or a list of them, or `None` for a row of text alone.
        text_column: Where the text is; `None` for images without text.
        on_bad_sample: `"skip"`, or `"raise"` to stop at the first one.
        lengths: Length of every row in ids, for `train_sampling_strategy="group_by_length"`; by default those of the
            dataset's column `length`, if it has one. `measure_lengths` finds them out.
        image_root: Where relative paths of images start, and what no path may leave: one that does makes a bad sample.
            By default the working directory, and paths are taken for the caller's own.

    Raises:
        TypeError: If the dataset has no length, as a streamed one.
        ValueError: If it is empty or lacks a column.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        text_column: str | None = "text",
        on_bad_sample: str = "skip",
        lengths: Sequence[int] | None = None,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"TrainingDataset needs a dataset with a length, got {type(dataset).__name__}. Hand a streamed "
                "dataset to Trainer itself: the collators number its rows."
            )
        if len(dataset) == 0:
            raise ValueError("The dataset is empty.")
        if on_bad_sample not in _ON_BAD_SAMPLE:
            raise ValueError(f"`on_bad_sample` must be one of {_ON_BAD_SAMPLE}, got {on_bad_sample!r}.")
        names = _column_names(dataset)
        self.image_column = "codes" if "codes" in names else image_column
        self.text_column = text_column
        self.on_bad_sample = on_bad_sample
        self.image_root = image_root
        self._check_columns(names)
        wanted = [self.image_column, text_column, "prompt", "messages", "sample_id", "length"]
        self.dataset = _undecoded(dataset, [name for name in wanted if name in names])
        self._lengths = _row_lengths(dataset, lengths, names)
        # Shared with worker processes, in both directions.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._is_bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def _check_columns(self, names: list[str]) -> None:
        has_text = self.text_column is None or self.text_column in names or "messages" in names
        has_images = self.image_column in names
        if not has_text:
            raise ValueError(f"The dataset has no column {self.text_column!r} for `text_column`; it has {names}.")
        if not has_images and self.text_column is None:
            raise ValueError(f"The dataset has no column {self.image_column!r} for `image_column`; it has {names}.")

    @property
    def epoch(self) -> int:
        """The epoch whose samples are given out, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Has samples carry this epoch from now on, those of running workers too."""
        self._epoch.fill_(epoch)

    @property
    def bad_samples(self) -> list[int]:
        """Indices of the bad samples met so far, by this process and its workers."""
        return self._is_bad.nonzero().flatten().tolist()

    def measure_lengths(self, processor: ImageTextProcessor) -> TrainingDataset:
        """Counts the ids of every row, which `train_sampling_strategy="group_by_length"` needs; decodes no image.

        Returns:
            Itself.
        """
        self._lengths = measure_lengths(self.dataset, processor, self.image_column, self.text_column or "text")
        return self

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            IndexError: If there is no such row.
            ValueError: If the sample is bad and `on_bad_sample="raise"`, or if all samples are bad.
        """
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for a dataset of {size} samples")
        for step in range(size):
            position = (index + step) % size
            try:
                return self._read(position)
            except ValueError as error:
                self._report(position, error)
        raise ValueError(f"All {size} samples of the dataset are bad; the warnings say why.")

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """All samples in order, each read when it is looked at; the length alone is known without."""
        return (_LazySample(self, index) for index in range(len(self)))

    def _read(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        sample: dict[str, Any] = {}
        if self.image_column == "codes":
            sample["codes"] = read_codes(row.get("codes"))
        else:
            sample["images"] = read_images(row.get(self.image_column), self.image_root)
        sample["text"] = None if self.text_column is None else row.get(self.text_column)
        if row.get("prompt") is not None:
            sample["prompt"] = row["prompt"]
        if (messages := read_messages(row)) is not None:
            sample["messages"] = messages
        check_sample(sample, needs_text=self.text_column is not None)
        if "messages" in sample:
            sample["messages"] = read_message_images(sample["messages"], self.image_root)
        sample["sample_id"] = read_sample_id(row, index)
        sample["epoch"] = self.epoch
        if self._lengths is not None:
            sample["input_ids"] = range(self._lengths[index])
        return sample

    def _report(self, index: int, error: ValueError) -> None:
        if self.on_bad_sample == "raise":
            raise ValueError(f"Sample {index} of the dataset is bad: {error}") from error
        if not self._is_bad[index]:
            self._is_bad[index] = True
            logger.warning(f"Sample {index} of the dataset is bad and is replaced by the next good one: {error}")


class _LazySample(Mapping):
    """A sample that is read on first need, so that `Trainer` can ask for all lengths without decoding an image."""

    def __init__(self, dataset: TrainingDataset, index: int) -> None:
        self._dataset, self._index = dataset, index
        self._sample: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        lengths = self._dataset._lengths
        if name == "input_ids" and lengths is not None:
            return range(lengths[self._index])
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, Any]:
        if self._sample is None:
            self._sample = self._dataset[self._index]
        return self._sample


def _column_names(dataset: Any) -> list[str]:
    names = getattr(dataset, "column_names", None)
    return list(dataset[0]) if names is None else list(names)


def _undecoded(dataset: Any, columns: list[str]) -> Any:
    """A `datasets.Dataset` that leaves decoding to us, where a corrupt image is caught, and reads no other columns."""
    if not hasattr(dataset, "cast_column") or dataset.format["type"] == "custom":
        return dataset  # The user's own transform decides what a row is.
    import datasets  # type: ignore[import-untyped]

    dataset = dataset.with_format(None).select_columns(columns)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return dataset


def _row_lengths(dataset: Any, lengths: Sequence[int] | None, names: list[str]) -> list[int] | None:
    if lengths is None and "length" in names:
        lengths = dataset["length"] if hasattr(dataset, "column_names") else [row["length"] for row in dataset]
    if lengths is None:
        return None
    if len(lengths) != len(dataset):
        raise ValueError(f"Got {len(lengths)} lengths for {len(dataset)} rows.")
    return [int(length) for length in lengths]


__all__ = ["TrainingDataset"]
