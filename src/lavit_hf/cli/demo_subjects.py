"""What `lavit demo` shows: pictures to look at, with a question each, and prompts to draw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from ..data.scenes import BACKGROUNDS, Facts, Scene, facts_of, judge, parse_caption, render, sample_scene
from ..data.scenes.language import CaptionError, captions_of
from ..data.scenes.questions import Question, ask_questions
from ..data.scenes.sampling import QUESTIONS, dice_for

_SEED = 1  # of scenes that no training has seen
_SHOWN = (("validation", 0), ("validation", 1), ("held_out", 0))
_DRAWN = (("validation", 2), ("validation", 3), ("validation", 4), ("held_out", 1))


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
    """

    name: str
    image: Image.Image
    question: str
    change: str
    answer: str | None = None
    facts: Facts | None = None
    changed_facts: Facts | None = None


@dataclass
class Subjects:
    """All of the demo: pictures to look at, and prompts to draw, with what should be on a drawing if it is known."""

    pictures: list[Subject] = field(default_factory=list)
    prompts: list[tuple[str, Facts | None]] = field(default_factory=list)


def given_subjects(images: Iterable[tuple[str, Image.Image]], question: str, change: str, prompt: str) -> Subjects:
    """Pictures of the user, with their names."""
    pictures = [Subject(name, image, question, change) for name, image in images]
    return Subjects(pictures, [(prompt, None)])


def scene_subjects() -> Subjects:
    """Scenes that no training has seen, always the same ones, whatever becomes of them."""
    prompts = [captions_of(sample_scene(split, _SEED, index))[0] for split, index in _DRAWN]
    return Subjects(
        [_scene_subject(split, index) for split, index in _SHOWN],
        [(prompt, parse_caption(prompt)) for prompt in prompts],
    )


def _scene_subject(split: str, index: int) -> Subject:
    scene = sample_scene(split, _SEED, index)
    question: Question = ask_questions(scene, dice_for(split, _SEED, index, QUESTIONS))[-2]  # what stands where
    used = {scene.background, *(item.color for item in scene.objects)}
    background = next(name for name in BACKGROUNDS if name not in used)
    return Subject(
        name=f"scene {index} of {split}",
        image=render(scene),
        question=question.question,
        change=f"on a {background} background",
        answer=question.answer,
        facts=facts_of(scene),
        changed_facts=facts_of(Scene(background, scene.objects)),
    )


def verdict(is_right: bool | None) -> str:
    """What to write behind something, if it is known whether it is right."""
    return "" if is_right is None else " (right)" if is_right else " (wrong)"


def is_caption_right(caption: str, facts: Facts | None) -> bool | None:
    """Whether a caption says all of what is there and nothing else."""
    if facts is None:
        return None
    try:
        return parse_caption(caption) == facts
    except CaptionError:
        return False


def is_drawing_right(drawing: Image.Image, facts: Facts | None) -> bool | None:
    """Whether all of that is on a drawing and nothing else."""
    return None if facts is None else facts_of(judge(drawing)) == facts
