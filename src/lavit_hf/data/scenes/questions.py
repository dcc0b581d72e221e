"""Questions about a scene, with answers of one or two words."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .dice import Dice
from .world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    place_of,
    relation_between,
)

KINDS = ("color", "shape", "size", "count", "background", "place", "relation", "yes_no")
NUMBERS = ("zero", "one", "two", "three")
_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


class Question(NamedTuple):
    """A question with its only right answer; `kind` is one of `KINDS`."""

    question: str
    answer: str
    kind: str


def ask_questions(scene: Scene, dice: Dice) -> list[Question]:
    """One question of every kind that the scene allows.

    Half of all questions of the kind yes_no are to be answered with yes, and half of each of its wordings. A pair of
    shape and color that is held out is mentioned only in scenes that have one.

    Args:
        scene: One to three objects, no two of the same shape and color.
        dice: Chooses among the questions.

    Returns:
        Between five and eight questions, in the order of `KINDS`.
    """
    found = [
        _ask_color(scene, dice),
        _ask_shape(scene, dice),
        _ask_size(scene, dice),
        _ask_count(scene, dice),
        Question("What color is the background?", scene.background, "background"),
        _ask_place(scene, dice),
        _ask_relation(scene, dice),
        _ask_yes_no(scene, dice),
    ]
    return [question for question in found if question is not None]


def _ask_color(scene: Scene, dice: Dice) -> Question | None:
    candidates = _with_unique(scene, "shape")
    if not candidates:
        return None
    item = dice.choice(candidates)
    return Question(f"What color is the {item.shape}?", item.color, "color")


def _ask_shape(scene: Scene, dice: Dice) -> Question | None:
    candidates = _with_unique(scene, "color")
    if not candidates:
        return None
    item = dice.choice(candidates)
    return Question(f"What shape is the {item.color} object?", item.shape, "shape")


def _ask_size(scene: Scene, dice: Dice) -> Question:
    item = dice.choice(scene.objects)
    return Question(f"What size is the {_name(item)}?", item.size, "size")


def _ask_count(scene: Scene, dice: Dice) -> Question:
    what = dice.choice(("objects", "color", "shape"))
    if what == "objects":
        return Question("How many objects are there?", NUMBERS[len(scene.objects)], "count")
    values = [getattr(item, what) for item in scene.objects]
    # One in four asks for something that is mostly not there.
    asked = dice.choice(values if dice.below(4) else list(COLORS) if what == "color" else SHAPES)
    things = f"{asked} objects" if what == "color" else _PLURALS[asked]
    return Question(f"How many {things} are there?", NUMBERS[values.count(asked)], "count")


def _ask_place(scene: Scene, dice: Dice) -> Question:
    item = dice.choice(scene.objects)
    if dice.below(2):
        return Question(f"Where is the {_name(item)}?", place_of(item), "place")
    return Question(f"What is in the {place_of(item)}?", _name(item), "place")


def _ask_relation(scene: Scene, dice: Dice) -> Question | None:
    facing = _facing(scene)
    if not facing:
        return None
    first, relation, second = dice.choice(facing)
    return Question(f"What is {relation} the {_name(second)}?", _name(first), "relation")


def _ask_yes_no(scene: Scene, dice: Dice) -> Question:
    is_true = dice.below(2) == 1
    ask = dice.choice((_claim_existence, _claim_color, _claim_background, _claim_relation))
    claim = ask(scene, dice, is_true) or _claim_existence(scene, dice, is_true)
    return Question(claim, "yes" if is_true else "no", "yes_no")


def _claim_existence(scene: Scene, dice: Dice, is_true: bool) -> str:
    if is_true:
        return f"Is there a {_name(dice.choice(scene.objects))}?"
    present = {item.pair for item in scene.objects}
    absent = [pair for pair in _mentionable(scene) if pair not in present]
    # Mostly half right, as otherwise one glance at the colors would do.
    if dice.below(4):
        item = dice.choice(scene.objects)
        absent = [pair for pair in absent if (pair[0] == item.shape) != (pair[1] == item.color)]
    shape, color = dice.choice(absent)
    return f"Is there a {color} {shape}?"


def _claim_color(scene: Scene, dice: Dice, is_true: bool) -> str | None:
    candidates = _with_unique(scene, "shape")
    if not candidates:
        return None
    item = dice.choice(candidates)
    others = [color for shape, color in _mentionable(scene) if shape == item.shape and color != item.color]
    return f"Is the {item.shape} {item.color if is_true else dice.choice(others)}?"


def _claim_background(scene: Scene, dice: Dice, is_true: bool) -> str:
    others = [color for color in BACKGROUNDS if color != scene.background]
    return f"Is the background {scene.background if is_true else dice.choice(others)}?"


def _claim_relation(scene: Scene, dice: Dice, is_true: bool) -> str | None:
    facing = _facing(scene)
    if not facing:
        return None
    first, relation, second = dice.choice(facing)
    if not is_true:
        others = [other for other in RELATIONS if other not in (relation, OPPOSITE[relation])]
        relation = dice.choice((OPPOSITE[relation], dice.choice(others)))
    return f"Is the {_name(first)} {relation} the {_name(second)}?"


def _name(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _with_unique(scene: Scene, attribute: str) -> list[SceneObject]:
    """The objects that this attribute alone tells from the others."""
    counts = Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


def _facing(scene: Scene) -> list[tuple[SceneObject, str, SceneObject]]:
    """Every two objects that face each other, in both orders, and how the first stands to the second."""
    return [
        (first, relation, second)
        for first in scene.objects
        for second in scene.objects
        if first is not second and (relation := relation_between(first, second)) is not None
    ]


def _mentionable(scene: Scene) -> list[tuple[str, str]]:
    """The pairs that may be asked for: else training would teach that held-out ones are never there."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    return pairs if scene.has_held_out_pair else [pair for pair in pairs if pair not in HELD_OUT_PAIRS]
