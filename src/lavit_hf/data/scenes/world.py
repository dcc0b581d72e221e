"""Scenes: one to three shapes on a plain background, where they stand, and how scenes are drawn at random.

Scene `index` of a split is a function of seed, split and index alone.
"""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

_Item = TypeVar("_Item")

# Positions and sizes are in units of 1/64 of the picture's side, so that a scene does not depend on its resolution.
UNITS = 64

# Chosen to differ from each other even after the blur of a small autoencoder.
SHAPES = ("circle", "square", "triangle", "cross", "ring", "moon")
# In a picture of 64 pixels with patches of 8, even the small ones are three to four patches wide.
SIZES = {"small": 20, "large": 28}
COLORS = {
    "red": (220, 45, 45),
    "green": (35, 185, 60),
    "blue": (50, 80, 225),
    "yellow": (245, 215, 45),
    "cyan": (70, 215, 235),
    "pink": (235, 75, 200),
}
# Green is on purpose among both: an object never has the color of its background.
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "green": COLORS["green"],
}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
UNKNOWN = "unknown"  # shape, color or background of what cannot be read from a picture

# Never drawn nor mentioned outside the split `held_out`. Every shape and every color is here once, so that all of
# them are equally common elsewhere.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "red"),
        ("square", "green"),
        ("triangle", "blue"),
        ("cross", "yellow"),
        ("ring", "cyan"),
        ("moon", "pink"),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
        shape: One of `SHAPES`; `UNKNOWN` if it was read from a picture and looks like none of them.
        color: One of `COLORS`, or `UNKNOWN` likewise.
        size: One of `SIZES`.
        x: Center, in 1/64 of the picture's width.
        y: Center, in 1/64 of the picture's height, downwards.
    """

    shape: str
    color: str
    size: str
    x: int
    y: int

    @property
    def pair(self) -> tuple[str, str]:
        """Shape and color, by which an object is told from the others of its scene."""
        return self.shape, self.color


@dataclass(frozen=True)
class Scene:
    """The truth about a picture.

    Attributes:
        background: One of `BACKGROUNDS`, or `UNKNOWN` if a picture's is none of them.
        objects: In reading order.
    """

    background: str
    objects: tuple[SceneObject, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the scene in types that JSON has; [`~Scene.from_dict`] is the inverse."""
        return {"background": self.background, "objects": [dict(vars(item)) for item in self.objects]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scene:
        """Makes a scene of what [`~Scene.to_dict`] gave, or of a row's `scene`.

        Raises:
            ValueError: Something is missing, or is nothing a scene can have.
        """
        try:
            objects = tuple(SceneObject(**item) for item in values["objects"])
            scene = cls(values["background"], objects)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a scene: {error}. Expected what Scene.to_dict() returns.") from error
        _check_value("background", scene.background, (*BACKGROUNDS, UNKNOWN))
        for item in scene.objects:
            _check_value("shape", item.shape, (*SHAPES, UNKNOWN))
            _check_value("color", item.color, (*COLORS, UNKNOWN))
            _check_value("size", item.size, SIZES)
            for name, place in (("x", item.x), ("y", item.y)):
                if not isinstance(place, int) or not 0 <= place <= UNITS:
                    raise ValueError(f"{name} must be an integer from 0 to {UNITS}, got {place!r}.")
        return scene

    @property
    def has_held_out_pair(self) -> bool:
        return any(item.pair in HELD_OUT_PAIRS for item in self.objects)


def _check_value(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{value!r} is no {name} of a scene; expected one of {', '.join(known)}.")


def place_of(item: SceneObject) -> str:
    """Returns the quarter of the picture that an object's center is in, such as `"top left"`."""
    return f"{'top' if 2 * item.y < UNITS else 'bottom'} {'left' if 2 * item.x < UNITS else 'right'}"


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """Returns how `first` stands to `second`: one of `RELATIONS`, or `None` if they do not face each other.

    Objects face each other if they are apart in one direction only. Of two that stand diagonally nothing is said,
    because people would not agree on it.
    """
    across, down = second.x - first.x, second.y - first.y
    is_apart_across, is_apart_down = abs(across) > UNITS // 4, abs(down) > UNITS // 4
    if is_apart_across == is_apart_down:
        return None
    if is_apart_across:
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


class PortableRng:
    """Makes random choices that are the same everywhere, from the raw output of PCG64.

    NumPy promises the same raw output on every platform and in every version; of `Generator.integers` and the like it
    does not (NEP 19).

    Args:
        key: Non-negative integers. Sequences that differ in more than zeros at their end are independent streams.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, limit: int) -> int:
        """Returns an integer from 0 to `limit - 1`."""
        # The bias is limit / 2**64: far below anything that could be noticed.
        return (self._bits.random_raw() * limit) >> 64

    def between(self, low: int, high: int) -> int:
        """Returns an integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[_Item]) -> _Item:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """Returns a shuffled copy (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


SPLITS = ("train", "validation", "held_out")
MAX_OBJECTS = 3

# Each purpose has random choices of its own, so that a caption does not depend on the number of tries for its scene.
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
    rng = rng_for(split, seed, index, SCENE)
    while True:
        scene = _draw(rng, split)
        if split == "held_out" or _is_for_validation(scene) == (split == "validation"):
            return scene


def rng_for(split: str, seed: int, index: int, purpose: int) -> PortableRng:
    """Returns the random choices for one purpose and one scene."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split of the scenes; expected one of {', '.join(SPLITS)}.")
    seed, index = operator.index(seed), operator.index(index)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}.")
    return PortableRng(seed, SPLITS.index(split), index, purpose)


def _is_for_validation(scene: Scene) -> bool:
    """Splits all possible scenes in two by a checksum: different seeds alone would let a picture be in both."""
    return zlib.crc32(json.dumps(scene.to_dict()).encode()) % _VALIDATION_SHARE == 0


def _draw(rng: PortableRng, split: str) -> Scene:
    count = rng.between(1, MAX_OBJECTS)
    pairs = [rng.choice(_HELD_OUT_PAIRS if split == "held_out" else _SEEN_PAIRS)]
    while len(pairs) < count:
        pair = rng.choice(_SEEN_PAIRS)
        if pair not in pairs:
            pairs.append(pair)
    pairs = rng.shuffled(pairs)
    sizes = [rng.choice(list(SIZES)) for _ in pairs]
    places = _draw_places(rng, count)
    used = {color for _, color in pairs}
    background = rng.choice([name for name in BACKGROUNDS if name not in used])
    objects = [
        SceneObject(shape, color, size, *place)
        for (shape, color), size, place in zip(pairs, sizes, places, strict=True)
    ]
    return Scene(background, tuple(sorted(objects, key=lambda item: (item.y, item.x))))


def _draw_places(rng: PortableRng, count: int) -> list[tuple[int, int]]:
    """Returns centers (x, y) of so many objects: each in the middle of a quarter of its own.

    Few places, as what a small model learns to draw well in little time is a small world.
    """
    if count == 1:
        cells = [rng.choice(_CELLS)]
    elif count == 2:
        cells = list(rng.choice(_NEIGHBORS))
    else:
        empty = rng.below(len(_CELLS))
        cells = [cell for number, cell in enumerate(_CELLS) if number != empty]
    return [(_center_of(column), _center_of(row)) for row, column in cells]


def _center_of(half: int) -> int:
    """Returns the center of the first (0) or second (1) half of the picture's side."""
    return UNITS * (2 * half + 1) // 4
