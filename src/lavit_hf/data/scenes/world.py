"""What a scene is: one to three shapes on a plain background, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        """As what JSON knows; [`~Scene.from_dict`] is the inverse."""
        return {"background": self.background, "objects": [dict(vars(item)) for item in self.objects]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scene:
        """
        Args:
            values: What [`~Scene.to_dict`] gave, or a row's `scene`.

        Raises:
            ValueError: Something is missing, or is nothing a scene can have.
        """
        try:
            objects = tuple(SceneObject(**item) for item in values["objects"])
            scene = cls(values["background"], objects)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a scene: {error}. Expected what Scene.to_dict() returns.") from error
        _check(scene)
        return scene

    @property
    def has_held_out_pair(self) -> bool:
        return any(item.pair in HELD_OUT_PAIRS for item in self.objects)


def _check(scene: Scene) -> None:
    _check_value("background", scene.background, (*BACKGROUNDS, UNKNOWN))
    for item in scene.objects:
        _check_value("shape", item.shape, (*SHAPES, UNKNOWN))
        _check_value("color", item.color, (*COLORS, UNKNOWN))
        _check_value("size", item.size, SIZES)
        for name, place in (("x", item.x), ("y", item.y)):
            if not isinstance(place, int) or not 0 <= place <= UNITS:
                raise ValueError(f"{name} must be an integer from 0 to {UNITS}, got {place!r}.")


def _check_value(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{value!r} is no {name} of a scene; expected one of {', '.join(known)}.")


def place_of(item: SceneObject) -> str:
    """The quarter of the picture that an object's center is in, such as `"top left"`."""
    return f"{'top' if 2 * item.y < UNITS else 'bottom'} {'left' if 2 * item.x < UNITS else 'right'}"


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """How `first` stands to `second`: one of `RELATIONS`, or `None` if they do not face each other.

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
