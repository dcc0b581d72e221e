"""Scene `index` of a split: a function of seed, split and index alone."""

from __future__ import annotations

import json
import operator
import zlib

from .dice import Dice
from .world import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, UNITS, Scene, SceneObject

SPLITS = ("train", "validation", "held_out")
MAX_OBJECTS = 3

# Of what is drawn for one scene, so that a caption does not change with the number of tries that a scene took.
SCENE, CAPTION, QUESTIONS = range(3)

_ALL_PAIRS = [(shape, color) for shape in SHAPES for color in COLORS]
_SEEN_PAIRS = [pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS]
_HELD_OUT_PAIRS = sorted(HELD_OUT_PAIRS)
_VALIDATION_SHARE = 8  # one of so many scenes is for validation

_CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # quarters of the picture: row and column
_NEIGHBORS = [(a, b) for a in _CELLS for b in _CELLS if a < b and (a[0] == b[0]) != (a[1] == b[1])]


def sample_scene(split: str, seed: int, index: int) -> Scene:
    """Draws a scene.

    Args:
        split: `"train"` and `"validation"` have no scene in common, whatever the seeds, and none of the held-out pairs
            of shape and color; every scene of `"held_out"` has exactly one of those.
        seed: Selects one of the sequences of scenes, not negative.
        index: Which one of that sequence.

    Returns:
        Between one and three objects, no two of the same shape and color, none in the color of the background. Two
        always face each other; three stand around a corner, the one in it facing both others.

    Raises:
        ValueError: There is no such split, or a number is negative.
    """
    dice = dice_for(split, seed, index, SCENE)
    while True:
        scene = _draw(dice, split)
        if split == "held_out" or _is_for_validation(scene) == (split == "validation"):
            return scene


def dice_for(split: str, seed: int, index: int, purpose: int) -> Dice:
    """The random choices of one kind for one scene."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split of the scenes; expected one of {', '.join(SPLITS)}.")
    seed, index = operator.index(seed), operator.index(index)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}.")
    return Dice(seed, SPLITS.index(split), index, purpose)


def _is_for_validation(scene: Scene) -> bool:
    """Splits all possible scenes in two by a checksum: different seeds alone would let a picture be in both."""
    return zlib.crc32(json.dumps(scene.to_dict()).encode()) % _VALIDATION_SHARE == 0


def _draw(dice: Dice, split: str) -> Scene:
    count = dice.between(1, MAX_OBJECTS)
    pairs = [dice.choice(_HELD_OUT_PAIRS if split == "held_out" else _SEEN_PAIRS)]
    while len(pairs) < count:
        pair = dice.choice(_SEEN_PAIRS)
        if pair not in pairs:
            pairs.append(pair)
    pairs = dice.shuffled(pairs)
    sizes = [dice.choice(list(SIZES)) for _ in pairs]
    places = _draw_places(dice, count)
    used = {color for _, color in pairs}
    background = dice.choice([name for name in BACKGROUNDS if name not in used])
    objects = [
        SceneObject(shape, color, size, *place)
        for (shape, color), size, place in zip(pairs, sizes, places, strict=True)
    ]
    return Scene(background, tuple(sorted(objects, key=lambda item: (item.y, item.x))))


def _draw_places(dice: Dice, count: int) -> list[tuple[int, int]]:
    """Centers (x, y) of so many objects: each in the middle of a quarter of its own.

    Few places, as what a small model learns to draw well in little time is a small world.
    """
    if count == 1:
        cells = [dice.choice(_CELLS)]
    elif count == 2:
        cells = list(dice.choice(_NEIGHBORS))
    else:
        empty = dice.below(len(_CELLS))
        cells = [cell for number, cell in enumerate(_CELLS) if number != empty]
    return [(_center_of(column), _center_of(row)) for row, column in cells]


def _center_of(half: int) -> int:
    """Of the first (0) or second (1) half of the picture's side."""
    return UNITS * (2 * half + 1) // 4
