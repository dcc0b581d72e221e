"""The images of a dataset's row, however the row holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.image_conversion import check_array, load_image, to_rgb


def read_images(value: Any) -> list[Image.Image]:
    """Decodes the image, or the list of images, of one row.

    Args:
        value: `None` (no image), or one image or a list of them: PIL images, arrays or tensors of `uint8`, paths,
            URLs, file contents, or what `datasets.Image(decode=False)` gives, `{"bytes": ..., "path": ...}`.

    Returns:
        RGB images, upright and fully decoded.

    Raises:
        ValueError: If one of them is corrupt, empty, or no image.
    """
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [_read_image(image) for image in values]


def _read_image(value: Any) -> Image.Image:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _from_array(value)
    if value is None:
        raise ValueError("the image is missing")
    return to_rgb(load_image(value))


def _from_array(value: np.ndarray | torch.Tensor) -> Image.Image:
    array = check_array(value)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be of dtype uint8 to be an image, got {array.dtype}")
    array = np.moveaxis(array, 0, -1)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


__all__ = ["read_images"]
