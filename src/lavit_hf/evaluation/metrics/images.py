"""Images given to metrics."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image


def open_image(stored: dict[str, Any]) -> Image.Image:
    """Opens an image that evaluate has stored, in RGB.

    Args:
        stored: `bytes` of a file, or the `path` of one; what `datasets.Image(decode=False)` makes of paths and images.

    Raises:
        OSError: The file is missing or no image.
    """
    content = stored["bytes"]
    with Image.open(stored["path"] if content is None else io.BytesIO(content)) as image:
        return image.convert("RGB")


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


__all__ = ["choose_device", "open_image"]
