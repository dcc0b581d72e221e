"""`lavit ask`: answers a question about an image."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_compile, check_pictures, find_model, parse_regions
from .options import (
    Beams,
    CompileText,
    Device,
    Dtype,
    ImageSource,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    Model,
    NumTokens,
    Region,
    RunDtype,
)


def ask(
    image: ImageSource,
    question: Annotated[str, typer.Argument(help="A question about it, in quotes.", show_default=False)],
    model: Model = None,
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
    """Answer a question about an image, in a few words.

    \b
    Examples:
      lavit ask photo.jpg "What color is the cat?" --model lavit-7b-v2
      lavit ask photo.jpg "How many people are there?" --model lavit-7b-v2 --device cuda:1
    """
    if not question.strip():
        raise ValueError("The question is empty.")
    check_pictures([image])
    check_compile(compile, beams)
    regions = parse_regions(region, 1)
    checkpoint = find_model(model)

    from .generation import answer_question
    from .loading import load
    from .pictures import open_image

    options = {"num_beams": beams, "length_penalty": length_penalty}
    options |= {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
    picture = open_image(image)
    lavit = load(checkpoint, device, dtype.value, compile)
    print(answer_question(lavit, picture, question.strip(), options, num_tokens, regions))
