"""`lavit draw` and `lavit reconstruct`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..utils.progress import bar_options
from .loading import Lavit, load, without_bars
from .pictures import open_image, open_images, save_picture

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
    images, failures = open_images(sources)
    if failures:
        raise ValueError("\n".join(failures))
    pipeline = load_pipeline(load(model, device, dtype), decoder)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline(
        [*(image for _, image in images), prompt] if images else prompt, generator=generator, **options
    ).images
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
    image = open_image(source)
    pipeline = load_pipeline(load(model, device, dtype), decoder)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline.reconstruct(image, generator=generator, **options).images
    _save(drawing, output, seed)


def load_pipeline(lavit: Lavit, decoder: str | None = None) -> LavitTextToImagePipeline:
    """Adds a pixel decoder to a loaded checkpoint.

    Args:
        lavit: Model and processor.
        decoder: Which of its pixel decoders; by default the high-resolution one.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: The checkpoint has no such pixel decoder, or one of other codes.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from ..pipelines import LavitTextToImagePipeline

    parts = {"model": lavit.model, "processor": lavit.processor}
    try:
        with without_bars(logging), without_bars(transformers_logging):
            pipeline = LavitTextToImagePipeline.from_pretrained(
                lavit.pixel_decoders, decoder=decoder, dtype=lavit.model.dtype, **parts
            )
    except OSError as error:
        raise ValueError(f"{lavit.pixel_decoders} cannot draw: {error}") from error
    # No bars for what takes less than a second.
    pipeline.set_progress_bar_config(**bar_options("Drawing", delay=1.0, leave=False))
    return pipeline.to(lavit.model.device)


def make_generator(seed: int | None) -> tuple[int, torch.Generator]:
    """A source of randomness that is the same on every device, and its seed; a new one by default."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    return seed, torch.Generator().manual_seed(seed)


def _save(drawing: Image.Image, output: Path, seed: int) -> None:
    save_picture(drawing, output)
    print(f"Wrote {output} ({drawing.width} x {drawing.height} pixels, seed {seed})")
