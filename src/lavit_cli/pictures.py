"""Pictures in and out of the command line."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lavit_hf.processing.image_processing_pil_lavit import load_image, to_rgb
from lavit_hf.utils.atomic_files import complete_file

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "JPEG": {"quality": 95},
    "WEBP": {"quality": 95},
}
_GREY = (150, 150, 150)
_PATCH_BORDER = (120, 120, 120)
_GREYED = 0.8  # how much of a dropped patch is plain grey
_SMALLEST_SIDE = 200  # of a panel: smaller pictures are shown larger


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


def grey_out_dropped(image: Image.Image, keep_mask: torch.Tensor, grid: tuple[int, int]) -> Image.Image:
    """Greys the patches that became no token.

    Args:
        image: The picture, of any size: the model sees it squeezed into its grid of patches.
        keep_mask: True where a patch is kept, `[num_patches]`.
        grid: Rows and columns of the patches.

    Returns:
        A picture of the same size.
    """
    rows, columns = grid
    result = image.copy()
    greyed = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _GREY), _GREYED)
    draw = ImageDraw.Draw(result)
    for patch, kept in enumerate(keep_mask.tolist()):
        row, column = divmod(patch, columns)
        left, right = (round(edge * image.width / columns) for edge in (column, column + 1))
        top, bottom = (round(edge * image.height / rows) for edge in (row, row + 1))
        if not kept and left < right and top < bottom:
            result.paste(greyed.crop((left, top, right, bottom)), (left, top))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_PATCH_BORDER)
    return result


def fit_panel(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Enlarges small pictures so that their patches can be seen; or brings a picture to a given size."""
    if size is not None:
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, -(-_SMALLEST_SIDE // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


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
