"""Captions and questions about scenes, and facts that are read back from captions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from .world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    PortableRng,
    Scene,
    SceneObject,
    place_of,
    relation_between,
)


class ObjectFacts(NamedTuple):
    """What a caption says about one object."""

    size: str
    color: str
    shape: str


class RelationFacts(NamedTuple):
    """States that `subject` is `relation` (either "left of" or "above") `reference`."""

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
    """Returns all that can be said about a scene, made or read from a picture: what each of its captions says."""
    objects = scene.objects
    relations = [
        _relation(_object(first), relation, _object(second))
        for index, first in enumerate(objects)
        for second in objects[index + 1 :]
        if (relation := relation_between(first, second)) is not None
    ]
    return Facts(scene.background, tuple(sorted(map(_object, objects))), tuple(sorted(relations)))


def parse_caption(text: str) -> Facts:
    """Reads what a caption says. `parse_caption(caption) == facts_of(scene)` for every caption of a scene.

    Upper case, spaces and a period at the end do not matter. What it says need not be possible.

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
    """Makes facts of the groups of `_CORE_PATTERN`: object, relation, object, link, relation, object."""
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
    """Returns every caption of a scene: all orders of its objects, in all wordings.

    They are 4, 8 or 16, for as many as 1, 2 or 3 objects.

    Raises:
        ValueError: The scene has another number of objects, or they do not face each other.
    """
    return [
        frame.format(core=core, background=scene.background)
        for core in _cores(list(scene.objects))
        for frame in _FRAMES
    ]


def write_caption(scene: Scene, rng: PortableRng) -> str:
    """Draws one of [`captions_of`], all equally likely; raises as that does."""
    core = rng.choice(_cores(list(scene.objects)))
    return rng.choice(_FRAMES).format(core=core, background=scene.background)


def _cores(objects: list[SceneObject]) -> list[str]:
    """Returns what stands in the frames: objects and how they stand to each other."""
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


KINDS = ("color", "shape", "size", "count", "background", "place", "relation", "yes_no")
NUMBERS = ("zero", "one", "two", "three")
_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


class Question(NamedTuple):
    """A question with its only right answer; `kind` is one of `KINDS`."""

    question: str
    answer: str
    kind: str


def ask_questions(scene: Scene, rng: PortableRng) -> list[Question]:
    """Asks one question of every kind that the scene allows: five to eight, in the order of `KINDS`.

    Half of all questions of the kind yes_no are to be answered with yes, and half of each of its wordings. A pair of
    shape and color that is held out is mentioned only in scenes that have one.
    """
    found = [
        _ask_color(scene, rng),
        _ask_shape(scene, rng),
        _ask_size(scene, rng),
        _ask_count(scene, rng),
        Question("What color is the background?", scene.background, "background"),
        _ask_place(scene, rng),
        _ask_relation(scene, rng),
        _ask_yes_no(scene, rng),
    ]
    return [question for question in found if question is not None]


def _ask_color(scene: Scene, rng: PortableRng) -> Question | None:
    if not (candidates := _with_unique(scene, "shape")):
        return None
    item = rng.choice(candidates)
    return Question(f"What color is the {item.shape}?", item.color, "color")


def _ask_shape(scene: Scene, rng: PortableRng) -> Question | None:
    if not (candidates := _with_unique(scene, "color")):
        return None
    item = rng.choice(candidates)
    return Question(f"What shape is the {item.color} object?", item.shape, "shape")


def _ask_size(scene: Scene, rng: PortableRng) -> Question:
    item = rng.choice(scene.objects)
    return Question(f"What size is the {_name(item)}?", item.size, "size")


def _ask_count(scene: Scene, rng: PortableRng) -> Question:
    what = rng.choice(("objects", "color", "shape"))
    if what == "objects":
        return Question("How many objects are there?", NUMBERS[len(scene.objects)], "count")
    values = [getattr(item, what) for item in scene.objects]
    # One in four asks for something that is mostly not there.
    asked = rng.choice(values if rng.below(4) else list(COLORS) if what == "color" else SHAPES)
    things = f"{asked} objects" if what == "color" else _PLURALS[asked]
    return Question(f"How many {things} are there?", NUMBERS[values.count(asked)], "count")


def _ask_place(scene: Scene, rng: PortableRng) -> Question:
    item = rng.choice(scene.objects)
    if rng.below(2):
        return Question(f"Where is the {_name(item)}?", place_of(item), "place")
    return Question(f"What is in the {place_of(item)}?", _name(item), "place")


def _ask_relation(scene: Scene, rng: PortableRng) -> Question | None:
    if not (facing := _facing(scene)):
        return None
    first, relation, second = rng.choice(facing)
    return Question(f"What is {relation} the {_name(second)}?", _name(first), "relation")


def _ask_yes_no(scene: Scene, rng: PortableRng) -> Question:
    is_true = rng.below(2) == 1
    ask = rng.choice((_claim_existence, _claim_color, _claim_background, _claim_relation))
    claim = ask(scene, rng, is_true) or _claim_existence(scene, rng, is_true)
    return Question(claim, "yes" if is_true else "no", "yes_no")


def _claim_existence(scene: Scene, rng: PortableRng, is_true: bool) -> str:
    if is_true:
        return f"Is there a {_name(rng.choice(scene.objects))}?"
    present = {item.pair for item in scene.objects}
    absent = [pair for pair in _mentionable(scene) if pair not in present]
    # Mostly half right, as otherwise one glance at the colors would do.
    if rng.below(4):
        item = rng.choice(scene.objects)
        absent = [pair for pair in absent if (pair[0] == item.shape) != (pair[1] == item.color)]
    shape, color = rng.choice(absent)
    return f"Is there a {color} {shape}?"


def _claim_color(scene: Scene, rng: PortableRng, is_true: bool) -> str | None:
    if not (candidates := _with_unique(scene, "shape")):
        return None
    item = rng.choice(candidates)
    others = [color for shape, color in _mentionable(scene) if shape == item.shape and color != item.color]
    return f"Is the {item.shape} {item.color if is_true else rng.choice(others)}?"


def _claim_background(scene: Scene, rng: PortableRng, is_true: bool) -> str:
    others = [color for color in BACKGROUNDS if color != scene.background]
    return f"Is the background {scene.background if is_true else rng.choice(others)}?"


def _claim_relation(scene: Scene, rng: PortableRng, is_true: bool) -> str | None:
    if not (facing := _facing(scene)):
        return None
    first, relation, second = rng.choice(facing)
    if not is_true:
        others = [other for other in RELATIONS if other not in (relation, OPPOSITE[relation])]
        relation = rng.choice((OPPOSITE[relation], rng.choice(others)))
    return f"Is the {_name(first)} {relation} the {_name(second)}?"


def _name(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _with_unique(scene: Scene, attribute: str) -> list[SceneObject]:
    """Returns the objects that this attribute alone tells from the others."""
    counts = Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


def _facing(scene: Scene) -> list[tuple[SceneObject, str, SceneObject]]:
    """Returns every two objects that face each other, in both orders, and how the first stands to the second."""
    return [
        (first, relation, second)
        for first in scene.objects
        for second in scene.objects
        if first is not second and (relation := relation_between(first, second)) is not None
    ]


def _mentionable(scene: Scene) -> list[tuple[str, str]]:
    """Returns the pairs that may be asked for: else training would teach that held-out ones are never there."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    return pairs if scene.has_held_out_pair else [pair for pair in pairs if pair not in HELD_OUT_PAIRS]


def write_layout(scene: Scene, rng: PortableRng | None = None) -> str:
    """Returns the shortest text that says everything: all objects with their places, then the background.

    Args:
        scene: What to list.
        rng: Chooses the order of the objects; by default that of reading.
    """
    items = scene.objects if rng is None else rng.shuffled(scene.objects)
    objects = [f"{item.size} {item.color} {item.shape} {place_of(item)}" for item in items]
    return ", ".join([*objects, f"{scene.background} background"])


class Change(NamedTuple):
    """What to draw after a picture."""

    text: str
    scene: Scene


def change_scene(scene: Scene, rng: PortableRng) -> Change:
    """Changes the background of a scene, everything else being the same.

    Args:
        scene: What the picture shows.
        rng: Chooses the other background.

    Returns:
        Words for the change, and what is there after it.
    """
    used = {scene.background, *(item.color for item in scene.objects)}
    background = rng.choice([name for name in BACKGROUNDS if name not in used])
    return Change(f"on a {background} background", replace(scene, background=background))
