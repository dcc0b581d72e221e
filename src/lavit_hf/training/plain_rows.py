"""Rows of any dataset, given what those of a `TrainingDataset` have: images, a number of their own, and an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from .sample_images import read_images

_COLUMNS = ("images", "image", "codes", "text", "prompt", "messages")


class FollowsEpoch:
    """A collator that `EpochCallback` tells the epoch, for rows that do not carry it themselves."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by worker processes

    @property
    def epoch(self) -> int:
        """The epoch of rows that carry none, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Takes rows for those of this epoch from now on, in running workers, too."""
        self._epoch.fill_(epoch)


def complete_row(row: Mapping[str, Any], epoch: int = 0) -> dict[str, Any]:
    """A row as `TrainingDataset` would give it out; what it has already stays.

    Args:
        row: A row with `images`, or with an `image` (or a list of them).
        epoch: The epoch, if the row does not say.

    Raises:
        ValueError: If the row has nothing to learn from, or an image is corrupt.
    """
    check_columns(row)
    sample = dict(row)
    if row.get("epoch") is None:
        sample["epoch"] = epoch
    if row.get("sample_id") is None:
        sample["sample_id"] = number_row(row)
    if "images" not in row and "image" in row:
        try:
            sample["images"] = read_images(row["image"])
        except ValueError as error:
            raise bad_sample(sample["sample_id"], error) from error
    return sample


def bad_sample(sample_id: int, error: ValueError) -> ValueError:
    """The error of a collator about a row that a `TrainingDataset` would have left out."""
    return ValueError(f"Sample {sample_id} is bad: {str(error).rstrip('.')}. TrainingDataset skips such samples.")


def check_columns(row: Mapping[str, Any]) -> None:
    """Makes sure that a row has a column to learn from.

    Raises:
        ValueError: If it has none, most likely because `Trainer` has removed them.
    """
    if not set(_COLUMNS) - {"prompt"} & set(row):
        raise ValueError(
            f"A row has nothing but {sorted(row)}: neither images nor text. Trainer removes columns that are no "
            "inputs of the model before they get here: set `remove_unused_columns=False` in TrainingArguments. "
            "Columns of other names than `image`, `text` or `messages` need `dataset.rename_column`, or a "
            "TrainingDataset that is told their names."
        )


def number_row(row: Mapping[str, Any]) -> int:
    """A number made from the content of a row.

    It is the same in every epoch, process, worker and run, whatever the order of the rows. Rows of the same content
    share it.

    Returns:
        An integer from 0 to 2**63 - 1.
    """
    content = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    text = json.dumps(content, default=_digest, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _digest(value: Any) -> str:
    """What stands for something that JSON does not know."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {_digest(value.tobytes())}"
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.asarray(value)
        return f"{array.dtype} {array.shape} {_digest(array.tobytes())}"
    return hashlib.blake2b(value if isinstance(value, bytes) else str(value).encode(), digest_size=16).hexdigest()


__all__ = ["FollowsEpoch", "bad_sample", "check_columns", "complete_row", "number_row"]
