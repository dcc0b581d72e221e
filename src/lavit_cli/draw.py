"""`lavit draw`: draws a picture of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_picture_output, check_pictures, find_model, parse_regions
from .options import (
    AspectRatio,
    Compile,
    Device,
    Dtype,
    Model,
    NumTokens,
    Output,
    PixelDecoder,
    Region,
    RunDtype,
    Seed,
)


def draw(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.", show_default=False)],
    output: Output,
    model: Model = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="Picture before the text; may be given several times."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.", show_default=False)] = None,
    decoder: PixelDecoder = None,
    aspect_ratio: AspectRatio = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="25, lowres 50")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="How much to stress the prompt.", show_default="4, with pictures 5")
    ] = None,
    num_tokens: NumTokens = None,
    region: Region = None,
    min_tokens: Annotated[
        int | None, typer.Option(min=0, help="Fewest tokens to draw; more are more detailed.", show_default="20")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to draw; few make a sketch.", show_default="200")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    compile: Compile = False,
) -> None:
    """Draw a picture of a prompt.

    \b
    Examples:
      lavit draw "a cat on a red chair" --model lavit-7b-v2 -o cat.png
      lavit draw "a fox in the snow" --model lavit-7b-v2 -o fox.png --aspect-ratio 16:9 --seed 7
      lavit draw "this dog on a beach" --image dog.jpg --model lavit-7b-v2 -o beach.png
    """
    if not prompt.strip() and not image:
        raise ValueError("The prompt is empty: say what to draw.")
    check_pictures(image or [])
    regions = parse_regions(region, len(image or []))
    check_picture_output(output)
    checkpoint = find_model(model)

    from .loading import load, load_pipeline
    from .pictures import make_generator, open_images, save_drawing

    images, failures = open_images(image or [])
    if failures:
        raise ValueError("\n".join(failures))
    pipeline = load_pipeline(load(checkpoint, device, dtype.value, compile), decoder and decoder.value)
    seed, generator = make_generator(seed)
    (drawing,) = pipeline(
        [*(picture for _, picture in images), prompt] if images else prompt,
        negative_prompt=negative_prompt,
        aspect_ratio=aspect_ratio,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_image_tokens=num_tokens,
        regions=regions,
        min_new_tokens=min_tokens,
        max_new_tokens=max_tokens,
        generator=generator,
    ).images
    save_drawing(drawing, output, seed)
