"""The page: what stands where, and what happens when somebody uploads, moves, asks or draws."""

from __future__ import annotations

import functools
import inspect
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..processing.image_processing_pil_lavit import load_image, to_rgb
from .examples import Examples
from .studio import MAX_CHARACTERS, Drawing, Look, Studio
from .token_strip import known_style, token_strip

VISITORS = 20  # that may wait
_MAX_FILE = "20mb"
_KEPT_SECONDS = 3600  # for which uploaded files stay
_MAX_SEED = 2**32 - 1
_STEPS = 25
_SHOWN: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
_NO_PICTURE = "Choose a picture first."
_PROGRESS = gr.Progress()  # gradio puts that of the visitor in its place


def open_picture(path: str, name: str | None = None) -> Image.Image:
    """Opens a file of a visitor.

    Args:
        path: Where it is on this machine, which no message may tell.
        name: How they call it.

    Raises:
        gradio.Error: If it is no picture.
    """
    name = name or Path(path).name
    try:
        return to_rgb(load_image(Path(path)))
    except ValueError as error:
        message = str(error).replace(path, name)
        raise gr.Error(message if name in message else f"{name}: {message}", print_exception=False) from error


def open_upload(payload: Any) -> Image.Image | None:
    """Opens what a visitor put into a component for pictures; `None` if nothing."""
    return None if payload is None else open_picture(payload.path, payload.orig_name)


def shown(function: Callable) -> Callable:
    """Makes errors that are made for users appear on the page."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    @functools.wraps(function)
    def iterate(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return iterate if inspect.isgeneratorfunction(function) else call


def create_demo(
    studio: Studio,
    examples: Examples,
    name: str,
    on_gpu: Callable[[Callable], Callable] = lambda function: function,
) -> gr.Blocks:
    """Makes the page.

    Args:
        studio: The checkpoint.
        examples: What can be tried without pictures of one's own.
        name: What the checkpoint is called.
        on_gpu: Wraps whatever needs an accelerator, such as `spaces.GPU`.

    Returns:
        The page, for [`launch`].
    """
    folder = tempfile.TemporaryDirectory(prefix="lavit-web-")
    with gr.Blocks(
        title=f"LaVIT: {name}", analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as demo:
        weakref.finalize(demo, folder.cleanup)  # lives as long as the page
        gr.HTML(known_style(examples.known))
        gr.Markdown(
            f"# {name}\n"
            "LaVIT reads a picture as *words*: it spends tokens on the patches that matter, and none on the gray "
            "ones. It writes pictures the same way."
        )
        with gr.Tab("Read a picture"):
            _add_reading(studio, examples, Path(folder.name), on_gpu)
        if studio.pipeline is not None:
            with gr.Tab("Draw a picture"):
                _add_drawing(studio, examples, on_gpu)
    return demo.queue(max_size=VISITORS, default_concurrency_limit=1)


def launch(demo: gr.Blocks, **options: Any) -> Any:
    """Serves the page until it is interrupted; options are those of `gradio.Blocks.launch`."""
    return demo.launch(max_file_size=_MAX_FILE, footer_links=[], **options)


def _add_reading(studio: Studio, examples: Examples, folder: Path, on_gpu: Callable) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(
                label="Picture", sources=["upload", "webcam", "clipboard"], height=320, elem_id="picture", format="png"
            )
            # Upright, RGB, and refused in words if it is none. (Of a subclass, gradio would write a .pyi beside this.)
            picture.preprocess = open_upload  # type: ignore[method-assign]
        with gr.Column():
            overlay = gr.Image(label="Patches that became tokens", height=320, elem_id="overlay", **_SHOWN)
    files = [folder / f"{index}.png" for index in range(len(examples.pictures))]
    for file, image in zip(files, examples.pictures, strict=True):
        image.save(file)
    gr.Examples([[str(file)] for file in files], [picture], label="Pictures to begin with")
    budget = gr.Slider(
        0, studio.num_patches, 0, step=1, label="Tokens (0: as many as it finds worth it)", elem_id="budget"
    )
    cost = gr.Markdown(elem_id="cost")
    caption = gr.Textbox(label="Caption", interactive=False, elem_id="caption")
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            label="Question",
            placeholder=examples.questions[0],
            scale=3,
            min_width=260,
            max_length=MAX_CHARACTERS,
            elem_id="question",
            submit_btn=True,
        )
        answer = gr.Textbox(label="Answer", interactive=False, scale=2, min_width=260, elem_id="answer")
    gr.Examples([[one] for one in examples.questions], [question], label="Questions to begin with")
    with gr.Accordion("Its words in the visual vocabulary: open one", open=True):
        strip = gr.HTML(elem_id="strip")

    def look(image: Image.Image | None, count: float) -> tuple[Any, str, str]:
        if image is None:
            return None, "", ""
        seen = studio.look(image, int(count) or None)
        return seen.overlay, _cost(seen), token_strip(image, seen, studio.grid)

    def describe(image: Image.Image | None, count: float) -> Iterator[str]:
        yield ""
        if image is not None:
            yield from studio.caption(image, int(count) or None)

    def respond(image: Image.Image | None, asked: str, count: float) -> Iterator[str]:
        if image is None:
            raise gr.Error(_NO_PICTURE, print_exception=False)
        yield ""
        yield from studio.answer(image, asked, int(count) or None)

    # While a slider moves, only its last place counts. What is cheap does not wait for what is written.
    for function, outputs, name, group in (
        (look, [overlay, cost, strip], "look", "look"),
        (describe, [caption], "caption", "model"),
    ):
        gr.on(
            [picture.change, budget.input],
            shown(on_gpu(function)),
            [picture, budget],
            outputs,
            trigger_mode="always_last",
            concurrency_id=group,
            show_progress="hidden",
            api_name=name,
        )
    question.submit(
        shown(on_gpu(respond)), [picture, question, budget], [answer], concurrency_id="model", api_name="ask"
    )
    if studio.pipeline is None:
        return
    with gr.Row():
        with gr.Column():
            button = gr.Button("Draw it again from these words", elem_id="redraw")
        with gr.Column():
            again = gr.Image(label="Drawn from its words", height=320, elem_id="again", **_SHOWN)

    def redraw(image: Image.Image | None, count: float, progress: Any = _PROGRESS) -> Image.Image:
        if image is None:
            raise gr.Error(_NO_PICTURE, print_exception=False)
        return studio.redraw(image, int(count) or None, progress=_steps(progress)).image

    button.click(shown(on_gpu(redraw)), [picture, budget], [again], concurrency_id="model", api_name="reconstruct")


def _add_drawing(studio: Studio, examples: Examples, on_gpu: Callable) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                label="Prompt",
                placeholder=examples.prompts[0],
                lines=2,
                max_length=MAX_CHARACTERS,
                elem_id="prompt",
            )
            pictures = gr.Gallery(
                label="Pictures before the text, if any", type="filepath", height=180, elem_id="pictures", columns=4
            )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MAX_SEED, elem_id="seed")
                guidance = gr.Slider(
                    1,
                    10,
                    studio.pipeline.default_guidance_scale(False),
                    step=0.1,
                    label="Guidance",
                    elem_id="guidance",
                )
                steps = gr.Slider(1, 100, _STEPS, step=1, label="Denoising steps", elem_id="steps")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column():
            drawing = gr.Image(label="Drawing", height=320, elem_id="drawing", **_SHOWN)
            facts = gr.Markdown(elem_id="facts")
    gr.Examples([[one] for one in examples.prompts], [prompt], label="Prompts to begin with")

    def draw(
        text: str,
        files: list[tuple[str, Any]] | None,
        number: float | None,
        scale: float,
        count: float,
        progress: Any = _PROGRESS,
    ) -> tuple[Image.Image, str]:
        images = [open_picture(path) for path, _ in files or ()]
        progress(0, desc="Writing the picture as words")
        chosen = int(number or 0)  # of a field that was emptied, none
        drawn = studio.draw(text, images, chosen, scale, int(count), _steps(progress))
        return drawn.image, _drawn(drawn, chosen)

    gr.on(
        [button.click, prompt.submit],
        shown(on_gpu(draw)),
        [prompt, pictures, seed, guidance, steps],
        [drawing, facts],
        concurrency_id="model",
        api_name="draw",
    )


def _cost(look: Look) -> str:
    taken, most = look.positions
    saved = (most - taken) * look.cache_bytes
    return (
        f"**{look.num_tokens} of {look.num_patches} patches** became tokens: {taken} positions of the language model "
        f"instead of {most} ({taken / most:.0%}), and {_size(taken * look.cache_bytes)} of its cache; "
        f"{_size(saved)} are saved."
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _drawn(drawing: Drawing, seed: int) -> str:
    size = f"{drawing.image.width} x {drawing.image.height} pixels"
    return f"{drawing.num_tokens} tokens, {size}. Seed {seed} draws it again."


def _steps(progress: Any) -> Callable[[int, int], None]:
    def report(step: int, total: int) -> None:
        progress((step, total), desc="Drawing", unit="steps")

    return report


__all__ = ["VISITORS", "create_demo", "launch"]
