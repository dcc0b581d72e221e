"""`lavit demo`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .demo_subjects import (
    Subject,
    Subjects,
    given_subjects,
    is_caption_right,
    is_drawing_right,
    scene_subjects,
    verdict,
)
from .draw import load_pipeline
from .generation import answer_question, caption_images
from .loading import Lavit, load
from .pictures import Panel, contact_sheet, fit_panel, grey_out_dropped, open_images, save_picture

if TYPE_CHECKING:
    from ..pipelines import LavitTextToImagePipeline

_RANDOM = (
    "Note: the weights of this checkpoint are random numbers. What follows shows that everything runs; captions, "
    "answers and drawings mean nothing, and the patches are kept for no reason."
)
_SEED = 0
_STEPS = 25


def run(
    sources: list[str],
    model: str,
    *,
    question: str,
    change: str,
    prompt: str,
    output: Path,
    device: str,
    dtype: str,
) -> None:
    """Prints what became of pictures and prompts, and writes a picture that shows it.

    Raises:
        ValueError: No image can be read; or, in the end, if there were some that cannot.
    """
    images, bad = open_images(sources)
    if bad and not images:
        raise ValueError("\n".join(bad))
    for failure in bad:
        print(f"lavit: left out: {failure}", file=sys.stderr)
    lavit = load(model, device, dtype)
    pipeline = load_pipeline(lavit)
    print(f"Checkpoint  {model}")
    if lavit.random_weights:
        print(_RANDOM)
    subjects = given_subjects(images, question, change, prompt) if images else scene_subjects()
    rows = [*_show_pictures(lavit, pipeline, subjects.pictures), _show_prompts(pipeline, subjects)]
    save_picture(contact_sheet(rows), output)
    print(f"Wrote       {output} (dropped patches are grey; seed {_SEED})")
    if bad:
        raise ValueError(f"{len(bad)} of {len(sources)} images could not be read.")


def _show_pictures(lavit: Lavit, pipeline: LavitTextToImagePipeline, subjects: list[Subject]) -> list[list[Panel]]:
    """One row per picture: itself, what is kept of it, and what is drawn of it."""
    images = [subject.image for subject in subjects]
    again = _draw(pipeline.reconstruct, images)
    changed = _draw(pipeline, [[subject.image, subject.change] for subject in subjects])
    captions = caption_images(lavit, images)
    rows = []
    for subject, caption, *drawings in zip(subjects, captions, again, changed, strict=True):
        rows.append(_describe(lavit, subject, caption) + _drawings(subject, *drawings))
    return rows


def _describe(lavit: Lavit, subject: Subject, caption: str) -> list[Panel]:
    """Prints what the model says of a picture; returns it with the patches that either branch keeps."""
    image, masks, grid = fit_panel(subject.image), _keep_masks(lavit, subject.image), _grid(lavit)
    answer = answer_question(lavit, subject.image, subject.question)
    caption_verdict = verdict(is_caption_right(caption, subject.facts))
    answer_verdict = verdict(None if subject.answer is None else answer == subject.answer)
    print(f"\nPicture     {subject.name} ({subject.image.width} x {subject.image.height} pixels)")
    for branch, mask in masks.items():
        use = "understanding" if branch == "continuous" else "drawing"
        print(f"Tokens      {int(mask.sum())} of {len(mask)} patches became tokens for {use} ({branch})")
    print(f"Caption     {caption}{caption_verdict}")
    print(f"Question    {subject.question}")
    print(f"Answer      {answer}{answer_verdict}")
    kept = [
        Panel(f"kept for {use}: {int(mask.sum())} of {len(mask)}", grey_out_dropped(image, mask, grid))
        for use, mask in zip(("reading", "drawing"), masks.values(), strict=True)
    ]
    texts = f"{caption}{caption_verdict}\n{subject.question} {answer}{answer_verdict}"
    return [Panel(texts, image), *kept]


def _drawings(subject: Subject, again: Image.Image, changed: Image.Image) -> list[Panel]:
    verdicts = [
        verdict(is_drawing_right(again, subject.facts)),
        verdict(is_drawing_right(changed, subject.changed_facts)),
    ]
    print(f"Again       drawn from its own tokens{verdicts[0]}")
    print(f"Changed     {subject.change!r}{verdicts[1]}")
    size = fit_panel(subject.image).size
    titles = (f"drawn from these tokens{verdicts[0]}", f"picture + {subject.change!r}{verdicts[1]}")
    return [Panel(title, fit_panel(one, size)) for title, one in zip(titles, (again, changed), strict=True)]


def _show_prompts(pipeline: LavitTextToImagePipeline, subjects: Subjects) -> list[Panel]:
    size = fit_panel(subjects.pictures[0].image).size
    panels = []
    print()
    for drawing, (prompt, facts) in zip(
        _draw(pipeline, [prompt for prompt, _ in subjects.prompts]), subjects.prompts, strict=True
    ):
        title = f"{prompt}{verdict(is_drawing_right(drawing, facts))}"
        print(f"Drawing     {title}")
        panels.append(Panel(title, fit_panel(drawing, size)))
    return panels


def _draw(pipeline: Callable[..., Any], prompts: list[Any]) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(_SEED) for _ in prompts]
    return pipeline(prompts, num_inference_steps=_STEPS, generator=generators).images


@torch.no_grad()
def _keep_masks(lavit: Lavit, image: Image.Image) -> dict[str, torch.Tensor]:
    """Which patches either branch keeps, `[num_patches]` each."""
    tokenizer = lavit.model.visual_tokenizer
    pixel_values = lavit.processor.image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
    return {
        "continuous": tokenizer.embed(pixel_values).keep_mask[0],
        "discrete": tokenizer.encode(pixel_values).keep_mask[0],
    }


def _grid(lavit: Lavit) -> tuple[int, int]:
    """Rows and columns of patches."""
    config = lavit.model.config.visual_tokenizer_config
    height, width = config.image_size
    rows = round((config.num_patches * height / width) ** 0.5)
    return rows, config.num_patches // rows
