"""Pictures in and out of the command line."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavit_hf.processing.image_processing_pil_lavit import load_image, to_rgb
from lavit_hf.utils.atomic_files import complete_file

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "JPEG": {"quality": 95},
    "WEBP": {"quality": 95},
}


def open_image(source: str) -> Image.Image:
    """Opens an image upright, as RGB.

    Raises:
        ValueError: It cannot be read; the message names it.
    """
    try:
        return to_rgb(load_image(source))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if source in message else f"{source}: {message}") from error


def open_images(sources: Sequence[str]) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """Opens images as far as they can be read.

    Args:
        sources: Where they are.

    Returns:
        Sources and images, in this order, and what is wrong with the others.
    """
    images, failures = [], []
    for source in sources:
        try:
            images.append((source, open_image(source)))
        except ValueError as error:
            failures.append(str(error))
    return images, failures


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a file, of the format that its suffix says, that appears only when it is complete."""
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as file:
        image.save(file, format=picture_format, **_SAVE_OPTIONS.get(picture_format, {}))


def make_generator(seed: int | None) -> tuple[int, torch.Generator]:
    """A source of randomness that is the same on every device, and its seed; a new one by default."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    return seed, torch.Generator().manual_seed(seed)


def save_drawing(drawing: Image.Image, path: Path, seed: int) -> None:
    """Writes a picture, and prints where it is and which seed draws it again."""
    save_picture(drawing, path)
    print(f"Wrote {path} ({drawing.width} x {drawing.height} pixels, seed {seed})")
