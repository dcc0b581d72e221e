"""Images given to metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...processing.image_processing_pil_lavit import load_image


def open_image(stored: dict[str, Any]) -> Image.Image:
    """Opens an image that evaluate has stored, in RGB.

    Args:
        stored: `bytes` of a file, or the `path` of one; what `datasets.Image(decode=False)` makes of paths and images.

    Raises:
        ValueError: The file is missing, no image, or too large to be decoded safely.
    """
    content = stored["bytes"]
    with load_image(Path(stored["path"]) if content is None else content) as image:
        return image.convert("RGB")


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


__all__ = ["choose_device", "open_image"]
