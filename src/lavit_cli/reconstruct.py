"""`lavit reconstruct`: draws a picture from its own tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_picture_output, check_pictures, find_model, parse_regions
from .options import (
    AspectRatio,
    Device,
    Dtype,
    ImageSource,
    Model,
    NumTokens,
    Output,
    PixelDecoder,
    Region,
    RunDtype,
    Seed,
)


def reconstruct(
    image: ImageSource,
    output: Output,
    model: Model = None,
    decoder: PixelDecoder = None,
    aspect_ratio: AspectRatio = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="How much to stress the tokens.", show_default="the checkpoint's, or 5")
    ] = None,
    num_tokens: NumTokens = None,
    region: Region = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Turn a picture into tokens, and draw what they say.

    \b
    Example:
      lavit reconstruct photo.jpg --model lavit-7b-v2 -o again.png
    """
    check_pictures([image])
    regions = parse_regions(region, 1)
    check_picture_output(output)
    checkpoint = find_model(model)

    from .loading import load, load_pipeline
    from .pictures import make_generator, open_image, save_drawing

    picture = open_image(image)
    pipeline = load_pipeline(load(checkpoint, device, dtype.value), decoder and decoder.value)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline.reconstruct(
        picture,
        aspect_ratio=aspect_ratio,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_image_tokens=num_tokens,
        regions=regions,
        generator=generator,
    ).images
    save_drawing(drawing, output, seed)
