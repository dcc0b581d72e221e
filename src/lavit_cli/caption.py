"""`lavit caption`: describes images."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .checks import check_compile, check_pictures, find_model, parse_regions
from .options import (
    Beams,
    CompileText,
    Device,
    Dtype,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    Model,
    NumTokens,
    Region,
    RunDtype,
)


def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files or URLs.", show_default=False)],
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="Text the caption starts from.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    num_tokens: NumTokens = None,
    region: Region = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    compile: CompileText = False,
) -> None:
    """Describe images, one line each.

    Of several images each line starts with the file's name and a tab. Those that cannot be read are left out, by name.

    \b
    Examples:
      lavit caption photo.jpg --model lavit-7b-v2
      lavit caption *.jpg --model lavit-7b-v2 --batch-size 16 > captions.tsv
      lavit caption photo.jpg --model lavit-7b-v2 --prompt "The weather in this picture is"
    """
    check_pictures(images)
    check_compile(compile, beams)
    regions = parse_regions(region, len(images))
    checkpoint = find_model(model)

    from lavit_hf.utils.progress import progress_bar

    from .generation import caption_images
    from .loading import load
    from .pictures import open_images

    options = {"num_beams": beams, "length_penalty": length_penalty}
    options |= {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
    lavit = load(checkpoint, device, dtype.value, compile)
    bad: list[str] = []
    with progress_bar("Captioning", len(images), len(images) > batch_size, unit="image") as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            opened, failures = open_images(batch)
            pictures = [picture for _, picture in opened]
            texts = caption_images(lavit, pictures, prompt, options, num_tokens, regions) if pictures else []
            for (source, _), text in zip(opened, texts, strict=True):
                # Around the bar, if both go to a terminal.
                bar.write(text if len(images) == 1 else f"{source}\t{text}")
            bad += failures
            if len(images) > 1:
                for failure in failures:
                    bar.write(f"lavit: left out: {failure}", file=sys.stderr)
            bar.update(len(batch))
    if bad:
        raise ValueError(f"{len(bad)} of {len(images)} images could not be read." if len(images) > 1 else bad[0])
