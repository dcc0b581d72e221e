"""`lavit demo`: shows what becomes of pictures and prompts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import check_picture_output, check_pictures, find_model, is_loopback, listen
from .options import Device, Dtype, Model, RunDtype

if TYPE_CHECKING:
    from PIL import Image

    from .loading import Lavit

_QUESTION, _CHANGE, _PROMPT = "What animal is this?", "in the snow", "a cat on a red chair"
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
    question: Annotated[str | None, typer.Option(help="What to ask about it.", show_default=_QUESTION)] = None,
    change: Annotated[
        str | None, typer.Option(help="What to draw of it: a text after the picture.", show_default=_CHANGE)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw from text alone.", show_default=_PROMPT)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PICTURE", help="File to write, such as a PNG.")
    ] = Path("out/demo.png"),
    web: Annotated[
        bool, typer.Option("--web", help="Show a page to play with instead: upload, ask, draw, move the budget.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address of the page; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 7860,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Show what becomes of pictures and prompts: tokens, captions, answers, drawings.

    Writes one with a row for each picture: itself, the patches that each of the two branches of the visual tokenizer
    keeps, the picture drawn from its own tokens, and drawn again with a change; then the first picture with a few and
    with many tokens, and what its caption says then; and a row of drawings of prompts.
    Without pictures it shows scenes with questions and prompts of their own, and says what is right and what is wrong.
    With --web, all of this is a page in a browser, and pictures, question and prompt are what it offers to begin with.

    \b
    Examples:
      lavit demo
      lavit demo --web
      lavit demo --image photo.jpg --model lavit-7b-v2 --output photo-patches.png
    """
    sources = image or []
    asked = {"--question": question, "--change": change, "--prompt": prompt}
    if not sources and (given := [name for name, value in asked.items() if value is not None]):
        raise ValueError(f"{given[0]} goes with pictures of yours: give --image, too.")
    question, change, prompt = question or _QUESTION, change or _CHANGE, prompt or _PROMPT
    check_pictures(sources)
    if not web:
        check_picture_output(output)
    checkpoint = find_model(model)
    listener = listen(host, port) if web else None

    if web:
        import lavit_hf.web  # noqa: F401 - says what is missing before anything is loaded
    from .demo_sheet import SEED, given_subjects, make_sheet, world_subjects
    from .loading import load, load_pipeline
    from .pictures import open_images, save_picture

    images, bad = open_images(sources)
    if bad and not images:
        raise ValueError("\n".join(bad))
    for failure in bad:
        print(f"lavit: left out: {failure}", file=sys.stderr)
    lavit = load(checkpoint, device, dtype.value)
    if listener is not None:
        _show_page(lavit, checkpoint, images, question, prompt, listener)
        return
    pipeline = load_pipeline(lavit)
    print(f"Checkpoint  {checkpoint}")
    if lavit.random_weights:
        print(_RANDOM)
    subjects = given_subjects(images, question, change, prompt) if images else world_subjects(checkpoint)
    save_picture(make_sheet(lavit, pipeline, subjects), output)
    print(f"Wrote       {output} (dropped patches are gray; seed {SEED})")
    if bad:
        raise ValueError(f"{len(bad)} of {len(sources)} images could not be read.")


def _show_page(
    lavit: Lavit,
    checkpoint: str,
    images: list[tuple[str, Image.Image]],
    question: str,
    prompt: str,
    listener: socket.socket,
) -> None:
    """Serves the page until Ctrl+C."""
    from lavit_hf.hub.facts import world_of
    from lavit_hf.utils.public_text import public_name
    from lavit_hf.web import Studio, create_demo, given_examples, launch, make_examples

    from .loading import load_pipeline

    try:
        pipeline = load_pipeline(lavit)
    except ValueError as error:
        print(f"lavit: the page draws nothing: {error}", file=sys.stderr)
        pipeline = None
    pictures = [picture for _, picture in images]
    examples = given_examples(pictures, question, prompt) if images else make_examples(world_of(checkpoint))
    page = create_demo(
        Studio(lavit.model, lavit.processor, pipeline, examples.known), examples, public_name(checkpoint)
    )
    host, port = listener.getsockname()[:2]
    is_public = not is_loopback(listener)
    listener.close()  # gradio takes it itself
    launch(page, server_name=host, server_port=port, quiet=True, prevent_thread_lock=True)
    print(f"The page is at {page.local_url} (Ctrl+C ends)", flush=True)
    if is_public:
        print("lavit: anybody who reaches this address may use it", file=sys.stderr)
    page.block_thread()
