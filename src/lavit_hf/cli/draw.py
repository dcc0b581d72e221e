"""`lavit draw` and `lavit reconstruct`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .loading import Lavit, load
from .pictures import check_files, open_image, save_png

if TYPE_CHECKING:
    from ..pipelines import LavitTextToImagePipeline


def draw(
    prompt: str,
    sources: list[str],
    model: str,
    *,
    output: Path,
    seed: int | None,
    options: dict[str, Any],
    decoder: str | None,
    device: str,
    dtype: str,
) -> None:
    """Draws one picture of a prompt, the given pictures before its text."""
    if not prompt.strip() and not sources:
        raise ValueError("The prompt is empty: say what to draw.")
    check_files(sources)
    check_output(output)
    images = [open_image(source) for source in sources]
    pipeline = load_pipeline(load(model, device, dtype), model, decoder)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline([*images, prompt] if images else prompt, generator=generator, **options).images
    _save(drawing, output, seed)


def reconstruct(
    source: str,
    model: str,
    *,
    output: Path,
    seed: int | None,
    options: dict[str, Any],
    decoder: str | None,
    device: str,
    dtype: str,
) -> None:
    """Draws a picture from its own tokens."""
    check_files([source])
    check_output(output)
    image = open_image(source)
    pipeline = load_pipeline(load(model, device, dtype), model, decoder)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline.reconstruct(image, generator=generator, **options).images
    _save(drawing, output, seed)


def load_pipeline(lavit: Lavit, model: str, decoder: str | None = None) -> LavitTextToImagePipeline:
    """Adds a pixel decoder to a loaded checkpoint.

    Args:
        lavit: Model and processor.
        model: Where they were loaded from.
        decoder: Which of its pixel decoders; by default the high-resolution one.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: The checkpoint has no such pixel decoder.
    """
    from diffusers.utils import logging

    from ..pipelines import LavitTextToImagePipeline

    logging.disable_progress_bar()  # of loading
    parts = {"model": lavit.model, "processor": lavit.processor}
    try:
        pipeline = LavitTextToImagePipeline.from_pretrained(model, decoder=decoder, dtype=lavit.model.dtype, **parts)
    except OSError as error:
        raise ValueError(f"{model} cannot draw: {error}") from error
    finally:
        logging.enable_progress_bar()
    pipeline.set_progress_bar_config(delay=1.0, leave=False)  # no bars for what takes less than a second
    return pipeline.to(lavit.model.device)


def make_generator(seed: int | None) -> tuple[int, torch.Generator]:
    """A source of randomness that is the same on every device, and its seed; a new one by default."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    return seed, torch.Generator().manual_seed(seed)


def check_output(path: Path) -> None:
    """Says before anything is drawn that it could not be written.

    Raises:
        ValueError: The file is no PNG, a directory is in its place, or its own directory cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: --output takes the name of a PNG file, such as {path.stem or 'picture'}.png.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; --output takes the name of a PNG file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: {folder} is no directory that you may write to.")


def _save(drawing: Image.Image, output: Path, seed: int) -> None:
    save_png(drawing, output)
    print(f"Wrote {output} ({drawing.width} x {drawing.height} pixels, seed {seed})")
