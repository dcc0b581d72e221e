"""`lavit demo`: shows what becomes of pictures and prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .checks import check_picture_output, check_pictures, find_model
from .options import Device, Dtype, Model, RunDtype

_RANDOM = (
    "Note: the weights of this checkpoint are random numbers. What follows shows that everything runs; captions, "
    "answers and drawings mean nothing, and the patches are kept for no reason."
)


def demo(
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Picture to look at; may be given several times.", show_default="scenes"),
    ] = None,
    model: Model = None,
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "What animal is this?",
    change: Annotated[str, typer.Option(help="What to draw of it: a text after the picture.")] = "in the snow",
    prompt: Annotated[str, typer.Option(help="What to draw from text alone.")] = "a cat on a red chair",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PICTURE", help="File to write, such as a PNG.")
    ] = Path("out/demo.png"),
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Show what becomes of pictures and prompts: tokens, captions, answers, drawings.

    Writes one with a row for each picture: itself, the patches that each of the two branches of the visual tokenizer
    keeps, the picture drawn from its own tokens, and drawn again with a change; then the first picture with a few and
    with many tokens, and what its caption says then; and a row of drawings of prompts.
    Without pictures it shows scenes with questions and prompts of their own, and says what is right and what is wrong.

    \b
    Examples:
      lavit demo
      lavit demo --image photo.jpg --model lavit-7b-v2 --output photo-patches.png
    """
    sources = image or []
    check_pictures(sources)
    check_picture_output(output)
    checkpoint = find_model(model)

    from .demo_sheet import SEED, given_subjects, make_sheet, scene_subjects
    from .loading import load, load_pipeline
    from .pictures import open_images, save_picture

    images, bad = open_images(sources)
    if bad and not images:
        raise ValueError("\n".join(bad))
    for failure in bad:
        print(f"lavit: left out: {failure}", file=sys.stderr)
    lavit = load(checkpoint, device, dtype.value)
    pipeline = load_pipeline(lavit)
    print(f"Checkpoint  {checkpoint}")
    if lavit.random_weights:
        print(_RANDOM)
    subjects = given_subjects(images, question, change, prompt) if images else scene_subjects()
    save_picture(make_sheet(lavit, pipeline, subjects), output)
    print(f"Wrote       {output} (dropped patches are grey; seed {SEED})")
    if bad:
        raise ValueError(f"{len(bad)} of {len(sources)} images could not be read.")
