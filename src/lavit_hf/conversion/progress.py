"""Progress in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub.utils import tqdm

# Takes the number of bytes that were done since the last call.
Progress = Callable[[int], object]


def progress_bar(title: str, total: int, show: bool) -> Any:
    """A bar that counts bytes up to `total`."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=not show)
