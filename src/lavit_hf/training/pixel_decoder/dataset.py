"""Samples of stage 3: an image, with the codes it was tokenized to if the dataset has them."""

from __future__ import annotations

import os
from typing import Any

from ..dataset import TrainingDataset

_CODES = "codes"


class PixelDecoderDataset(TrainingDataset):
    """A [`TrainingDataset`] of images without text, which keeps the images of rows that have codes as well.

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
        images, self._codes = _split_codes(dataset)
        super().__init__(images, image_column, text_column=None, on_bad_sample=on_bad_sample, image_root=image_root)

    def _read(self, index: int) -> dict[str, Any]:
        sample = super()._read(index)
        if self._codes is not None:
            sample[_CODES] = [list(codes) for codes in self._codes[index][_CODES]]
        return sample


def _split_codes(dataset: Any) -> tuple[Any, Any]:
    """The dataset without its codes, and the codes, or `None`."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        if _CODES not in names:
            return dataset, None
        return dataset.remove_columns(_CODES), dataset.with_format(None).select_columns(_CODES)
    if not hasattr(dataset, "__len__") or len(dataset) == 0 or _CODES not in dataset[0]:
        return dataset, None
    return [{name: row[name] for name in row if name != _CODES} for row in dataset], dataset


__all__ = ["PixelDecoderDataset"]
