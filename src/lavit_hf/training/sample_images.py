"""The images of a dataset's row, however the row holds them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.image_processing_pil_lavit import check_array, load_image, to_rgb
from ..utils.paths import is_inside, resolve_inside

SOURCES = ("image", "path", "url", "base64")
"""Where a part of a message may have its image, in the chats of transformers."""
_NO_PATHS = ("http://", "https://", "data:")


def read_images(value: Any, root: str | os.PathLike[str] | None = None) -> list[Image.Image]:
    """Decodes the image, or the list of images, of one row.

    Args:
        value: `None` (no image), or one image or a list of them: PIL images, arrays or tensors of `uint8`, paths,
            URLs, file contents, or what `datasets.Image(decode=False)` gives, `{"bytes": ..., "path": ...}`.
        root: Where relative paths start. A path that leads out of it is refused: it came from a file. Without a
            root, paths are the caller's own.

    Returns:
        RGB images, upright and fully decoded.

    Raises:
        ValueError: If one of them is corrupt, empty, or no image, or if its path leads out of the root.
    """
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [_read_image(image, root) for image in values]


def read_message_images(
    messages: Sequence[Mapping[str, Any]], root: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """Decodes the images that the messages of a chat hold themselves, so that a corrupt one is found.

    Args:
        messages: Messages whose content is a text, or a list of parts. A part of type `image` may have its image under
            one of the names of `SOURCES`.
        root: As in `read_images`.

    Returns:
        A copy with RGB images under `image`.

    Raises:
        ValueError: If one of them is corrupt, empty, or no image, or if its path leads out of the root.
    """
    return [{**message, "content": _read_content(message["content"], root)} for message in messages]


def _read_content(content: Any, root: str | os.PathLike[str] | None) -> Any:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        source = next((part[name] for name in SOURCES if part.get(name) is not None), None)
        if part["type"] == "image" and source is not None:
            rest = {name: value for name, value in part.items() if name not in SOURCES}
            part = {**rest, "image": _read_image(source, root)}
        parts.append(part)
    return parts


def _read_image(value: Any, root: str | os.PathLike[str] | None) -> Image.Image:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _from_array(value)
    if value is None:
        raise ValueError("the image is missing")
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise ValueError(f"the image is of type {type(value).__name__}")
    if root is not None and not isinstance(value, bytes):
        value = locate_image(os.fspath(value), root)
    return to_rgb(load_image(value))


def locate_image(source: str, root: str | os.PathLike[str]) -> str:
    """A path in the root as a path that can be opened; an URL as it is, and base64 so that it is not taken for a path.

    Raises:
        ValueError: The path leads out of the root.
    """
    if source.startswith(_NO_PATHS):
        return source
    path = Path(root, source)
    is_file = os.path.isfile(path)
    if not is_file and len(source) > 64 and not os.path.splitext(source)[1]:
        return f"data:;base64,{source}"
    datasets = sys.modules.get("datasets")
    if is_file and datasets is not None and is_inside(datasets.config.DOWNLOADED_DATASETS_PATH, path):
        return str(path)  # downloaded, or of an archive that `datasets` unpacked
    return str(resolve_inside(root, source, "the row"))


def _from_array(value: np.ndarray | torch.Tensor) -> Image.Image:
    array = check_array(value)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be of dtype uint8 to be an image, got {array.dtype}")
    array = np.moveaxis(array, 0, -1)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


__all__ = ["SOURCES", "locate_image", "read_images", "read_message_images"]
