"""What a visitor can try without pictures of their own: scenes of the world that a checkpoint was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..data.scenes import PortableRng
from ..data.worlds import World, find_world

_SEED = 1  # of scenes that no training has seen
_SHOWN, _KNOWN = 6, 24
_QUESTION, _PROMPTS = "What is this?", ("a cat on a red chair", "a dog in the snow")


@dataclass
class Examples:
    """What the page offers.

    Attributes:
        pictures: To look at.
        questions: To ask about them.
        prompts: To draw.
        known: Pictures in which codes are looked for.
    """

    pictures: list[Image.Image]
    questions: list[str]
    prompts: list[str]
    known: list[Image.Image] = field(default_factory=list)


def make_examples(world: World | None) -> Examples:
    """Scenes of a world, with questions and prompts in its own words.

    Args:
        world: The world; without one, pictures that artists drew, and words that anybody would use.
    """
    shown = world or find_world("emoji")
    scenes = [shown.sample_scene(shown.splits[1], _SEED, index) for index in range(_KNOWN)]
    pictures = [shown.render(scene) for scene in scenes]
    if world is None:
        return Examples(pictures[:_SHOWN], [_QUESTION], list(_PROMPTS), pictures)
    questions = [_ask(world, scene, index) for index, scene in enumerate(scenes[:_SHOWN])]
    prompts = [world.write_caption(scene, PortableRng(_SEED, index)) for index, scene in enumerate(scenes[-4:])]
    return Examples(pictures[:_SHOWN], list(dict.fromkeys(questions)), prompts, pictures)


def given_examples(pictures: Sequence[Image.Image], question: str, prompt: str) -> Examples:
    """Pictures of one's own."""
    return Examples(list(pictures), [question], [prompt], list(pictures))


def _ask(world: World, scene: Any, index: int) -> str:
    asked = world.ask_questions(scene, PortableRng(_SEED, index))
    return asked[index % len(asked)][0]


__all__ = ["Examples", "given_examples", "make_examples"]
