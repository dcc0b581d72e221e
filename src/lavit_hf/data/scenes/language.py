"""Scenes to captions, and captions back to facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .dice import Dice
from .world import BACKGROUNDS, COLORS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene, SceneObject, relation_between


class ObjectFacts(NamedTuple):
    """What a caption says about one object."""

    size: str
    color: str
    shape: str


class RelationFacts(NamedTuple):
    """That `subject` is `relation` (either "left of" or "above") `reference`."""

    subject: ObjectFacts
    relation: str
    reference: ObjectFacts


@dataclass(frozen=True)
class Facts:
    """All that a caption says; equal if they say the same in whatever words.

    Attributes:
        background: Its color.
        objects: Sorted; an object that is there twice is listed twice.
        relations: Sorted, between the objects that face each other.
    """

    background: str
    objects: tuple[ObjectFacts, ...]
    relations: tuple[RelationFacts, ...]


class CaptionError(ValueError):
    """A text is no caption of a scene."""


_FRAMES = (
    "{core} on a {background} background",
    "there is {core} on a {background} background",
    "a picture of {core} on a {background} background",
    "a {background} background with {core}",
)
_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_RELATION = rf"({'|'.join(RELATIONS)})"
_BACKGROUND = rf"a (?P<background>{'|'.join(BACKGROUNDS)}) background"
_FRAME_PATTERNS = (
    re.compile(rf"(?:there is |a picture of )?(?P<core>.+) on {_BACKGROUND}"),
    re.compile(rf"{_BACKGROUND} with (?P<core>.+)"),
)
_CORE_PATTERN = re.compile(rf"{_OBJECT}(?: {_RELATION} {_OBJECT}(?: (and|that is) {_RELATION} {_OBJECT})?)?")


def facts_of(scene: Scene) -> Facts:
    """All that can be said about a scene: what each of its captions says.

    Args:
        scene: Made, or read from a picture.

    Returns:
        Its facts.
    """
    objects = scene.objects
    relations = [
        _relation(_object(first), relation, _object(second))
        for index, first in enumerate(objects)
        for second in objects[index + 1 :]
        if (relation := relation_between(first, second)) is not None
    ]
    return Facts(scene.background, tuple(sorted(map(_object, objects))), tuple(sorted(relations)))


def parse_caption(text: str) -> Facts:
    """What a caption says. `parse_caption(caption) == facts_of(scene)` for every caption of a scene.

    Args:
        text: A caption; upper case, spaces and a period at the end do not matter.

    Returns:
        What it says, which need not be possible.

    Raises:
        CaptionError: It is not worded as captions of scenes are.
    """
    words = " ".join(text.lower().split()).rstrip(". ")
    for pattern in _FRAME_PATTERNS:
        frame = pattern.fullmatch(words)
        core = frame and _CORE_PATTERN.fullmatch(frame["core"])
        if frame and core:
            return _read_core(frame["background"], core.groups())
    raise CaptionError(f"Not a caption of a scene: {text!r}.")


def _read_core(background: str, groups: tuple[str | None, ...]) -> Facts:
    """From the groups of `_CORE_PATTERN`: object, relation, object, link, relation, object."""
    found = [ObjectFacts(*groups[start : start + 3]) for start in (0, 4, 9) if groups[start]]  # type: ignore[arg-type]
    relations = []
    if groups[3]:
        relations.append(_relation(found[0], groups[3], found[1]))
    if groups[8]:
        subject = found[0] if groups[7] == "and" else found[1]
        relations.append(_relation(subject, groups[8], found[2]))
    return Facts(background, tuple(sorted(found)), tuple(sorted(relations)))


def _object(item: SceneObject) -> ObjectFacts:
    return ObjectFacts(item.size, item.color, item.shape)


def _relation(subject: ObjectFacts, relation: str, reference: ObjectFacts) -> RelationFacts:
    if relation in ("left of", "above"):
        return RelationFacts(subject, relation, reference)
    return RelationFacts(reference, OPPOSITE[relation], subject)


def captions_of(scene: Scene) -> list[str]:
    """Every caption of a scene: all orders of its objects, in all wordings.

    Args:
        scene: One to three objects, placed as `sample_scene` does.

    Returns:
        4, 8 or 16 captions, for as many as 1, 2 or 3 objects.

    Raises:
        ValueError: The scene has another number of objects, or they do not face each other.
    """
    return [
        frame.format(core=core, background=scene.background)
        for core in _cores(list(scene.objects))
        for frame in _FRAMES
    ]


def write_caption(scene: Scene, dice: Dice) -> str:
    """One of [`captions_of`], all equally likely; raises as that does."""
    core = dice.choice(_cores(list(scene.objects)))
    return dice.choice(_FRAMES).format(core=core, background=scene.background)


def _cores(objects: list[SceneObject]) -> list[str]:
    """What stands in the frames: objects and how they stand to each other."""
    if len(objects) == 1:
        return [_phrase(objects[0])]
    if len(objects) == 2:
        first, second = objects
        return [f"{_phrase(a)} {_stated(a, b)} {_phrase(b)}" for a, b in ((first, second), (second, first))]
    if len(objects) == 3:
        corner = next((item for item in objects if all(relation_between(item, b) for b in objects if b != item)), None)
        if corner is not None:
            first, second = (item for item in objects if item != corner)
            return [core for a, b in ((first, second), (second, first)) for core in _cores_of_three(a, corner, b)]
    raise ValueError(f"Only scenes as sample_scene makes them have captions, got {objects}.")


def _cores_of_three(first: SceneObject, corner: SceneObject, second: SceneObject) -> tuple[str, str]:
    last = f"{_stated(corner, second)} {_phrase(second)}"
    return (
        f"{_phrase(corner)} {_stated(corner, first)} {_phrase(first)} and {last}",
        f"{_phrase(first)} {_stated(first, corner)} {_phrase(corner)} that is {last}",
    )


def _phrase(item: SceneObject) -> str:
    return f"a {item.size} {item.color} {item.shape}"


def _stated(first: SceneObject, second: SceneObject) -> str:
    relation = relation_between(first, second)
    if relation is None:
        raise ValueError(f"{first} and {second} do not face each other, so nothing can be said about them.")
    return relation
