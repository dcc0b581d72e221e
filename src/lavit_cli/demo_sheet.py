"""What `lavit demo` shows: pictures and prompts, and a sheet of what a checkpoint makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lavit_hf.data.scenes import PortableRng
from lavit_hf.data.worlds import World, find_world
from lavit_hf.hub.facts import world_of
from lavit_hf.utils.contact_sheet import Panel, contact_sheet
from lavit_hf.utils.patch_pictures import fit_panel, grey_out_dropped, patch_grid

from .generation import answer_question, caption_images
from .loading import Lavit

if TYPE_CHECKING:
    from lavit_hf.pipelines import LavitTextToImagePipeline

SEED = 0  # of drawings
_STEPS = 25
_BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1)  # shares of the patches
_WORLD = "emoji-small"  # whose scenes are shown to checkpoints that were measured on none
_SCENES_SEED = 1  # of scenes that no training has seen
_NUM_DRAWN = 4


@dataclass
class Subject:
    """A picture of the demo.

    Attributes:
        name: Where it is from.
        image: The picture.
        question: What to ask about it.
        change: What to draw of it.
        answer: The right answer, if it is known.
        facts: All that is on it, if it is known.
        changed_facts: All that should be on the changed one.
        world: What these are of.
    """

    name: str
    image: Image.Image
    question: str
    change: str
    answer: str | None = None
    facts: Any = None
    changed_facts: Any = None
    world: World | None = None


@dataclass
class Subjects:
    """All of the demo: pictures to look at, and prompts to draw, with what should be on a drawing if it is known."""

    pictures: list[Subject] = field(default_factory=list)
    prompts: list[tuple[str, Any]] = field(default_factory=list)
    world: World | None = None


def given_subjects(images: Iterable[tuple[str, Image.Image]], question: str, change: str, prompt: str) -> Subjects:
    """Pictures of the user, with their names."""
    pictures = [Subject(name, image, question, change) for name, image in images]
    return Subjects(pictures, [(prompt, None)])


def world_subjects(checkpoint: str) -> Subjects:
    """Scenes that no training has seen, of the world that a checkpoint was measured on, always the same ones.

    Args:
        checkpoint: Directory, or name on the Hub.
    """
    world = world_of(checkpoint) or find_world(_WORLD)
    unseen = world.splits[1:]
    scenes = [world.sample_scene(unseen[0], _SCENES_SEED, 1 + index) for index in range(_NUM_DRAWN)]
    prompts = [world.write_caption(scene, PortableRng(SEED, index)) for index, scene in enumerate(scenes)]
    return Subjects(
        [_world_subject(world, split) for split in unseen],
        [(prompt, world.facts_of(scene)) for prompt, scene in zip(prompts, scenes, strict=True)],
        world,
    )


def _world_subject(world: World, split: str) -> Subject:
    scene = world.sample_scene(split, _SCENES_SEED, 0)
    *_, (question, answer, _), _ = world.ask_questions(scene, PortableRng(SEED, 0))  # the last is for yes or no
    change, changed, _ = world.change_scene(scene, PortableRng(SEED, 1))
    return Subject(
        name=f"a scene of {split}",
        image=world.render(scene),
        question=question,
        change=change,
        answer=answer,
        facts=world.facts_of(scene),
        changed_facts=world.facts_of(changed),
        world=world,
    )


def verdict(is_right: bool | None) -> str:
    """The mark behind a caption, an answer or a drawing; empty if nobody knows whether it is right."""
    return "" if is_right is None else " (right)" if is_right else " (wrong)"


def is_caption_right(caption: str, facts: Any, world: World | None) -> bool | None:
    """Whether a caption says all of what is there and nothing else."""
    return None if world is None else world.parse_caption(caption) == facts


def is_drawing_right(drawing: Image.Image, facts: Any, world: World | None) -> bool | None:
    """Whether all of that is on a drawing and nothing else."""
    return None if world is None else world.facts_of(world.judge(drawing)) == facts


def make_sheet(lavit: Lavit, pipeline: LavitTextToImagePipeline, subjects: Subjects) -> Image.Image:
    """Prints what a checkpoint makes of pictures and prompts, and draws a sheet of all.

    Args:
        lavit: The checkpoint.
        pipeline: The same with its pixel decoder.
        subjects: What to show.

    Returns:
        One row per picture, one of the first picture with several budgets, and one of the prompts.
    """
    rows = _show_pictures(lavit, pipeline, subjects.pictures)
    return contact_sheet([*rows, _show_budgets(lavit, subjects.pictures[0]), _show_prompts(pipeline, subjects)])


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
    caption_verdict = verdict(is_caption_right(caption, subject.facts, subject.world))
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
        verdict(is_drawing_right(again, subject.facts, subject.world)),
        verdict(is_drawing_right(changed, subject.changed_facts, subject.world)),
    ]
    print(f"Again       drawn from its own tokens{verdicts[0]}")
    print(f"Changed     {subject.change!r}{verdicts[1]}")
    size = fit_panel(subject.image).size
    titles = (f"drawn from these tokens{verdicts[0]}", f"picture + {subject.change!r}{verdicts[1]}")
    return [Panel(title, fit_panel(one, size)) for title, one in zip(titles, (again, changed), strict=True)]


def _show_budgets(lavit: Lavit, subject: Subject) -> list[Panel]:
    """Prints what the model says of a picture that may cost so many tokens; returns it with the kept patches."""
    image, grid = fit_panel(subject.image), _grid(lavit)
    num_patches = lavit.model.config.visual_tokenizer_config.num_patches
    budgets = sorted({max(round(share * num_patches), 1) for share in _BUDGETS})
    panels = []
    print()
    for budget in (*budgets[:-1], None, budgets[-1]):
        mask = _keep_masks(lavit, subject.image, budget)["continuous"]
        (caption,) = caption_images(lavit, [subject.image], num_image_tokens=budget)
        said = f"{caption}{verdict(is_caption_right(caption, subject.facts, subject.world))}"
        count = f"{int(mask.sum())} of {num_patches} tokens" + (", its own choice" if budget is None else "")
        print(f"Budget      {count}: {said}")
        panels.append(Panel(f"{count}: {said}", grey_out_dropped(image, mask, grid)))
    return panels


def _show_prompts(pipeline: LavitTextToImagePipeline, subjects: Subjects) -> list[Panel]:
    size = fit_panel(subjects.pictures[0].image).size
    panels = []
    print()
    for drawing, (prompt, facts) in zip(
        _draw(pipeline, [prompt for prompt, _ in subjects.prompts]), subjects.prompts, strict=True
    ):
        title = f"{prompt}{verdict(is_drawing_right(drawing, facts, subjects.world))}"
        print(f"Drawing     {title}")
        panels.append(Panel(title, fit_panel(drawing, size)))
    return panels


def _draw(pipeline: Callable[..., Any], prompts: list[Any]) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(SEED) for _ in prompts]
    return pipeline(prompts, num_inference_steps=_STEPS, generator=generators).images


@torch.no_grad()
def _keep_masks(lavit: Lavit, image: Image.Image, num_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Which patches either branch keeps, `[num_patches]` each, as it decides or with a budget."""
    tokenizer = lavit.model.visual_tokenizer
    pixel_values = lavit.processor.image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
    masks = {
        "continuous": tokenizer.embed(pixel_values, num_tokens=num_tokens).keep_mask,
        "discrete": tokenizer.encode(pixel_values, num_tokens=num_tokens).keep_mask,
    }
    return {branch: mask[0] for branch, mask in masks.items() if mask is not None}


def _grid(lavit: Lavit) -> tuple[int, int]:
    """Rows and columns of patches."""
    config = lavit.model.config.visual_tokenizer_config
    return patch_grid(config.num_patches, config.image_size)
