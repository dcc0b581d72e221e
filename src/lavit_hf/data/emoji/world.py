"""Scenes: one to three concepts that artists drew, on a colored background, and how scenes are drawn at random.

Scene `index` of a split is a function of seed, split and index alone. Many are drawn at once, in arrays.
"""

from __future__ import annotations

import functools
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .sprites import load_pack

# Places and sizes are in units of 1/96 of the picture's side, so that a scene does not depend on its resolution.
UNITS = 96
MAX_OBJECTS = 3
BACKGROUNDS = {
    "white": (248, 248, 248),
    "gray": (150, 152, 158),
    "yellow": (250, 226, 110),
    "green": (120, 196, 120),
    "blue": (105, 165, 235),
    "purple": (158, 118, 208),
    "pink": (248, 168, 198),
    "orange": (246, 168, 84),
}
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
MIDDLE = PLACES.index("middle")
# Of an object in a quarter of the picture; a big one stands alone, in the middle. Sides in units, first and last.
SIZES = {"small": (25, 29), "medium": (36, 40), "big": (64, 80)}
SMALL, MEDIUM, BIG = range(3)
_FILLING = (84, 94)  # sides of an object that fills the picture
UNKNOWN = "unknown"  # concept or background of what cannot be read from a picture

UNSEEN_ARTIST = "twemoji"  # no training sees any of it
SPLITS = ("train", "validation", "held_out", "unseen_artist", "single")
_HELD_OUT_SHARE = 10  # one of so many pairs of concepts is held out
_VALIDATION_SHARE = 8  # one of so many scenes is for validation
_MIXED_PERCENT = 25  # scenes with an artist of its own for each object
_SCREENSHOT = (1, 2)  # a bar at the top, and one at the bottom, with lines of text under or above them

# Each purpose has random choices of its own, so that a caption does not depend on the number of tries for its scene.
SCENE, CAPTION, QUESTIONS, LOOKS = 0, 1, 2, 4


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        concept: What it is, one of `load_pack().concepts`; `UNKNOWN` if it was read from a picture and looks like none
            of them.
        artist: Who drew it.
        size: One of `SIZES`.
        place: One of `PLACES`.
        side: Width and height, in 1/96 of the picture's side.
        x: Center, in 1/4 of that unit.
        y: Center, downwards.
        angle: By how many degrees it is turned, clockwise.
        is_flipped: Whether left and right are exchanged.
    """

    concept: str
    artist: str
    size: str
    place: str
    side: int
    x: int
    y: int
    angle: int = 0
    is_flipped: bool = False


@dataclass(frozen=True)
class Scene:
    """The truth about a picture.

    Attributes:
        background: One of `BACKGROUNDS`, or `UNKNOWN` if a picture's is none of them.
        objects: In reading order.
        gradient: Direction in degrees in which the background becomes darker; `None` if it does not.
        screenshot: What else is there as in a crop of a screenshot: 0 for nothing, or one of two layouts.
    """

    background: str
    objects: tuple[SceneObject, ...]
    gradient: int | None = None
    screenshot: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the scene in types that JSON has; [`~Scene.from_dict`] is the inverse."""
        return {**vars(self), "objects": [dict(vars(item)) for item in self.objects]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scene:
        """Makes a scene of a dictionary.

        Args:
            values: What [`~Scene.to_dict`] gave, or a row's `scene`.

        Raises:
            ValueError: Something is missing, or is nothing a scene can have.
        """
        try:
            scene = cls(**{**values, "objects": tuple(SceneObject(**item) for item in values["objects"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a scene: {error}. Expected what Scene.to_dict() returns.") from error
        pack = load_pack()
        _check_value("background", scene.background, (*BACKGROUNDS, UNKNOWN))
        for item in scene.objects:
            _check_value("concept", item.concept, (*pack.concepts, UNKNOWN))
            _check_value("artist", item.artist, pack.artists)
            _check_value("size", item.size, SIZES)
            _check_value("place", item.place, PLACES)
            for name in ("side", "x", "y", "angle"):
                if type(getattr(item, name)) is not int:
                    raise ValueError(f"{name} must be an integer, got {getattr(item, name)!r}.")
        return scene

    @property
    def has_held_out_pair(self) -> bool:
        """Whether two of its concepts are shown together in the split `held_out` only."""
        return any(
            is_held_out(a.concept, b.concept) for number, a in enumerate(self.objects) for b in self.objects[:number]
        )


def _check_value(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{value!r} is no {name} of a scene of emoji.")


@dataclass
class SceneArrays:
    """Many scenes; the fields are those of `Scene` and `SceneObject`, as numbers.

    Attributes:
        background: Places in `BACKGROUNDS`, `[scenes]`.
        gradient: Degrees, `[scenes]`; -1 for none.
        screenshot: `[scenes]`.
        concept: Places in `load_pack().concepts`, `[scenes, 3]`; -1 where there is no object. What follows has the
            same shape.
        artist: Places in `load_pack().artists`.
        size: Places in `SIZES`.
        place: Places in `PLACES`.
        side: In units.
        x: In quarters of a unit.
        y: In quarters of a unit.
        angle: In degrees.
        is_flipped: 0 or 1.
    """

    background: np.ndarray
    gradient: np.ndarray
    screenshot: np.ndarray
    concept: np.ndarray
    artist: np.ndarray
    size: np.ndarray
    place: np.ndarray
    side: np.ndarray
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    is_flipped: np.ndarray

    def __len__(self) -> int:
        return len(self.background)

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene]) -> SceneArrays:
        """Puts scenes into arrays; their concepts have to be known.

        Raises:
            ValueError: Something in them cannot be drawn.
        """
        pack = load_pack()
        names = (list(BACKGROUNDS), pack.concepts, pack.artists, list(SIZES), PLACES)
        result = cls(*(np.full(len(scenes), -1, dtype=np.int64) for _ in range(3)), *_empty_objects(len(scenes)))
        for row, scene in enumerate(scenes):
            result.gradient[row] = -1 if scene.gradient is None else scene.gradient
            result.screenshot[row] = scene.screenshot
            try:
                result.background[row] = names[0].index(scene.background)
                for column, item in enumerate(scene.objects):
                    found = zip(names[1:], (item.concept, item.artist, item.size, item.place), strict=True)
                    numbers = [of_kind.index(name) for of_kind, name in found]
                    numbers += [item.side, item.x, item.y, item.angle, int(item.is_flipped)]
                    for array, number in zip(result._objects(), numbers, strict=True):
                        array[row, column] = number
            except ValueError as error:
                raise ValueError(f"{scene} cannot be drawn: {error}.") from error
        return result

    def to_scenes(self) -> list[Scene]:
        """Returns the scenes one by one."""
        pack, backgrounds, sizes = load_pack(), list(BACKGROUNDS), list(SIZES)
        scenes = []
        for row in range(len(self)):
            objects = []
            for column in np.flatnonzero(self.concept[row] >= 0):
                concept, artist, size, place, side, x, y, angle, flip = (
                    int(array[row, column]) for array in self._objects()
                )
                names = (pack.concepts[concept], pack.artists[artist], sizes[size], PLACES[place])
                objects.append(SceneObject(*names, side, x, y, angle, bool(flip)))
            gradient = int(self.gradient[row])
            scenes.append(
                Scene(
                    backgrounds[self.background[row]],
                    tuple(objects),
                    None if gradient < 0 else gradient,
                    int(self.screenshot[row]),
                )
            )
        return scenes

    def _objects(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)[3:]]


def _empty_objects(count: int) -> list[np.ndarray]:
    return [np.full((count, MAX_OBJECTS), -1 if number == 0 else 0, dtype=np.int64) for number in range(9)]


class ArrayRng:
    """Makes random choices for many samples at once, of which each has its own, the same everywhere.

    The n-th choice of a sample is a hash of its key and of n (SplitMix64; Steele, Lea and Flood, Fast splittable
    pseudorandom number generators, 2014), so that it depends neither on other samples nor on the library.

    Args:
        key: Non-negative integers, or arrays of one per sample.
    """

    def __init__(self, *key: Any) -> None:
        state = np.zeros(np.broadcast(*key).shape, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for part in key:
                state = _mix(state + _STEP + _mix(np.asarray(part, dtype=np.uint64) + _STEP))
        self._state = state
        self._count = 0

    def raw(self) -> np.ndarray:
        """Returns 64 random bits per sample."""
        self._count += 1
        with np.errstate(over="ignore"):
            return _mix(self._state + np.uint64(self._count) * _STEP)

    def below(self, limit: Any) -> np.ndarray:
        """Returns integers from 0 to `limit - 1`, which may be an array of one per sample."""
        high = np.asarray(limit, dtype=np.uint64)
        return (((self.raw() >> np.uint64(32)) * high) >> np.uint64(32)).astype(np.int64)

    def between(self, low: Any, high: Any) -> np.ndarray:
        """Returns integers from `low` to `high`, both included."""
        return np.asarray(low) + self.below(np.asarray(high) - low + 1)

    def unit(self) -> np.ndarray:
        """Returns numbers from 0 to 1, the latter excluded."""
        return (self.raw() >> np.uint64(11)).astype(np.float64) * 2.0**-53


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@functools.cache
def held_out_pairs() -> np.ndarray:
    """Which pairs of concepts are shown together in the split `held_out` only, `[concepts, concepts]`.

    A checksum of their names decides, so that a world with more concepts would hold out the same.
    """
    names = load_pack().concepts
    result = np.zeros((len(names), len(names)), dtype=bool)
    for first, a in enumerate(names):
        for second, b in enumerate(names[:first]):
            pair = "|".join(sorted((a, b)))
            result[first, second] = result[second, first] = zlib.crc32(pair.encode()) % _HELD_OUT_SHARE == 0
    return result


def is_held_out(first: str, second: str) -> bool:
    """Tells whether two concepts are a held-out pair."""
    names = load_pack().concepts
    if first not in names or second not in names:
        return False
    return bool(held_out_pairs()[names.index(first), names.index(second)])


def artists_of(split: str) -> list[int]:
    """Returns who draws in a split, as places in `load_pack().artists`."""
    wanted = split == "unseen_artist"
    return [number for number, name in enumerate(load_pack().artists) if (name == UNSEEN_ARTIST) == wanted]


def rng_for(split: str, seed: int, index: Any, *purpose: Any) -> ArrayRng:
    """Returns the random choices for one purpose, of one scene or of many.

    Raises:
        ValueError: There is no such split, or a number is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split of the emoji; expected one of {', '.join(SPLITS)}.")
    indices = np.asarray(index)
    if operator.index(seed) < 0 or (indices.size and indices.min() < 0):
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}.")
    return ArrayRng(seed, SPLITS.index(split), indices, *purpose)


def sample_scene(split: str, seed: int, index: int, shared_only: bool = False) -> Scene:
    """Draws a scene; see [`sample_scenes`]."""
    return sample_scenes(split, seed, [operator.index(index)], shared_only).to_scenes()[0]


def sample_scenes(
    split: str, seed: int, indices: Sequence[int] | np.ndarray, shared_only: bool = False
) -> SceneArrays:
    """Draws many scenes at once.

    Args:
        split: `"train"` and `"validation"` have no scene in common, whatever the seeds, and none of the held-out pairs
            of concepts; every scene of `"held_out"` has such a pair. `"unseen_artist"` is as validation, drawn by an
            artist that is in no other split. `"single"` has pictures as people have them: one object that fills the
            picture, or the crop of a screenshot.
        seed: Selects one of the sequences of scenes, not negative.
        indices: Which of that sequence; each scene depends on its own index alone.
        shared_only: Whether to leave out concepts that an artist did not draw: a smaller world.

    Returns:
        Scenes with one to three objects: of different concepts, none hardly visible on its background, each in a
        quarter of its own, or one alone in the middle.

    Raises:
        ValueError: There is no such split, or a number is negative.
    """
    indices = np.asarray(indices, dtype=np.int64)
    pending, attempt = np.arange(len(indices)), 0
    result = SceneArrays(*(np.zeros(len(indices), dtype=np.int64) for _ in range(3)), *_empty_objects(len(indices)))
    while len(pending):
        found, is_good = _draw(rng_for(split, seed, indices[pending], SCENE, attempt), split, shared_only)
        for field in fields(result):
            getattr(result, field.name)[pending[is_good]] = getattr(found, field.name)[is_good]
        pending, attempt = pending[~is_good], attempt + 1
    return result


def _draw(rng: ArrayRng, split: str, shared_only: bool) -> tuple[SceneArrays, np.ndarray]:
    """Draws scenes, some of which the split does not have; the second tells which it has."""
    pack = load_pack()
    held_out = held_out_pairs()
    known = np.flatnonzero(pack.is_shared) if shared_only else np.arange(len(pack.concepts))
    percent = rng.below(100)
    if split == "single":
        count = np.ones_like(percent)
    elif split == "held_out":
        count = np.where(percent < 53, 2, 3)
    else:
        count = np.select([percent < 25, percent < 65], [1, 2], 3)
    concept = known[np.stack([rng.below(len(known)) for _ in range(MAX_OBJECTS)], axis=-1)]
    partners = held_out[:, known][concept[:, 0]]
    partner = rng.below(np.maximum(partners.sum(axis=1), 1))
    if split == "held_out":
        # The n-th partner of the first one.
        order = np.argsort(~partners, axis=1, kind="stable")
        concept[:, 1] = known[np.take_along_axis(order, partner[:, None], axis=1)[:, 0]]
    is_there = np.arange(MAX_OBJECTS) < count[:, None]
    pairs = [(a, b) for a in range(MAX_OBJECTS) for b in range(a)]
    both = np.stack([is_there[:, a] & is_there[:, b] for a, b in pairs])
    is_pair = np.stack([held_out[concept[:, a], concept[:, b]] for a, b in pairs]) & both
    is_twice = np.stack([concept[:, a] == concept[:, b] for a, b in pairs]) & both
    is_good = ~is_twice.any(axis=0) & (is_pair.any(axis=0) == (split == "held_out"))

    # One artist for all, or for each object another; who did not draw a concept leaves the scene to another try.
    artists = np.array(artists_of(split))
    own = artists[np.stack([rng.below(len(artists)) for _ in range(MAX_OBJECTS)], axis=-1)]
    is_mixed = rng.below(100) < _MIXED_PERCENT
    artist = np.where(is_mixed[:, None], own, own[:, :1])
    is_good &= (pack.is_drawn[concept, artist] | ~is_there).all(axis=1)

    big = (count == 1) & ((rng.below(2) == 1) | (split == "single"))
    is_filling = rng.below(2) == 1
    screenshot = np.where(is_filling | (rng.below(2) == 1), 0, rng.between(*_SCREENSHOT)) * big
    if split == "single":
        screenshot = np.where(is_filling, 0, rng.between(*_SCREENSHOT))
    place = _permutation(rng)
    place = np.where(big[:, None], MIDDLE, place)
    size = np.stack([np.where(rng.below(100) < 35, SMALL, MEDIUM) for _ in range(MAX_OBJECTS)], axis=-1)
    size = np.where(big[:, None], BIG, size)
    lows, highs = np.array(list(SIZES.values())).T
    low, high = lows[size], highs[size]
    is_full = big & is_filling
    low, high = np.where(is_full[:, None], _FILLING[0], low), np.where(is_full[:, None], _FILLING[1], high)
    poses = [_draw_pose(rng, low[:, column], high[:, column], place[:, column]) for column in range(MAX_OBJECTS)]
    side, x, y, angle, flip = (np.stack(arrays, axis=-1) for arrays in zip(*poses, strict=True))
    background, is_visible = _choose_background(rng, concept, artist, is_there)
    is_good &= is_visible
    gradient = np.where(rng.below(2) == 1, 5 * rng.below(72), -1)
    objects = [concept, artist, size, place, side, x, y, angle, flip]
    # In reading order, as places are; what is not there comes last.
    order = np.argsort(np.where(is_there, place, len(PLACES)), axis=1, kind="stable")
    objects = [np.take_along_axis(array, order, axis=1) for array in objects]
    is_there = np.take_along_axis(is_there, order, axis=1)
    objects = [np.where(is_there, array, -1 if number == 0 else 0) for number, array in enumerate(objects)]
    scenes = SceneArrays(background, gradient, screenshot, *objects)
    if split in ("train", "validation"):
        is_good &= _is_for_validation(scenes) == (split == "validation")
    return scenes, is_good


def _permutation(rng: ArrayRng) -> np.ndarray:
    """Returns three different quarters of the picture for each sample."""
    return np.argsort(np.stack([rng.unit() for _ in range(4)], axis=-1), axis=1)[:, :MAX_OBJECTS]


def _draw_pose(rng: ArrayRng, low: np.ndarray, high: np.ndarray, place: np.ndarray) -> list[np.ndarray]:
    """Returns side, center, angle and flip of objects, so that each stays within its quarter."""
    side, angle = rng.between(low, high), rng.between(-8, 8)
    is_middle = place == MIDDLE
    half = UNITS // 2
    # A square that is turned by 8 degrees is 1.13 times as wide.
    slack = np.maximum((4 * half - (4 * side * 9 + 7) // 8) // 2, 0)
    slack = np.where(is_middle, np.where(side >= _FILLING[0], 6, 16), slack)
    x, y = (
        np.where(is_middle, 4 * half, 2 * half + 4 * half * part) + rng.between(-slack, slack)
        for part in (place % 2, place // 2)
    )
    return [side, x, y, angle, rng.below(2)]


def _choose_background(
    rng: ArrayRng, concept: np.ndarray, artist: np.ndarray, is_there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses among the backgrounds that all objects can be seen on; the second tells where there is one."""
    allowed = (visible_on()[concept, artist] | ~is_there[..., None]).all(axis=1)
    chosen = rng.below(np.maximum(allowed.sum(axis=1), 1))
    order = np.argsort(~allowed, axis=1, kind="stable")
    return np.take_along_axis(order, chosen[:, None], axis=1)[:, 0], allowed.any(axis=1)


def _is_for_validation(scenes: SceneArrays) -> np.ndarray:
    """Splits all scenes in two by a hash of what is where: seeds alone would let a scene be in both."""
    parts = [scenes.background]
    for column in range(MAX_OBJECTS):
        parts += [scenes.concept[:, column] + 1, scenes.artist[:, column], scenes.size[:, column]]
        parts += [scenes.place[:, column]]
    return ArrayRng(*parts).below(_VALIDATION_SHARE) == 0


def redraw(scene: Scene, artist: str) -> Scene | None:
    """Has another artist draw a scene: what is where, how large, turned and flipped stays.

    Args:
        scene: What the picture shows.
        artist: Who draws all of it, one of `load_pack().artists`.

    Returns:
        The scene; `None` if the artist did not draw one of its concepts, if one of these could not be seen on the
        background, or if one of the two scenes is for validation and the other one is not.

    Raises:
        ValueError: There is no such artist.
    """
    pack = load_pack()
    _check_value("artist", artist, pack.artists)
    number = pack.artists.index(artist)
    concepts = [pack.concepts.index(item.concept) for item in scene.objects]
    background = list(BACKGROUNDS).index(scene.background)
    if not (pack.is_drawn[concepts, number] & visible_on()[concepts, number, background]).all():
        return None
    redrawn = replace(scene, objects=tuple(replace(item, artist=artist) for item in scene.objects))
    before, after = _is_for_validation(SceneArrays.from_scenes([scene, redrawn]))
    return redrawn if before == after else None


_CONTRAST = 40  # least difference of a channel, of 255, that can be seen
_VISIBLE = 0.6  # least share of a sprite that can be seen on a background


@functools.cache
def visible_on() -> np.ndarray:
    """Tells which backgrounds a sprite can be seen on, `[concepts, artists, backgrounds]`.

    On a background of its own color an outline of an object is all that is left, and no program tells what it is.
    """
    sprites = load_pack().sprites
    alpha = sprites[..., 3].astype(np.int16)
    opaque = alpha > 127
    area = np.maximum(opaque.sum(axis=(2, 3)), 1)
    result = np.empty((*sprites.shape[:2], len(BACKGROUNDS)), dtype=bool)
    for number, color in enumerate(BACKGROUNDS.values()):
        difference = np.zeros(alpha.shape, dtype=np.int16)
        for channel, value in enumerate(color):
            np.maximum(difference, np.abs(sprites[..., channel].astype(np.int16) - value), out=difference)
        seen = (difference >= _CONTRAST) & opaque
        result[..., number] = (seen.sum(axis=(2, 3)) >= _VISIBLE * area) & _keeps_outline(seen, opaque)
    return result


def _keeps_outline(seen: Any, opaque: Any) -> np.ndarray:
    """Tells where what is seen is nearly as wide and as high as what is there."""
    keeps = np.ones(seen.shape[:2], dtype=bool)
    for axis in (2, 3):
        lines, all_lines = np.any(seen, axis=axis), np.any(opaque, axis=axis)
        keeps &= _extent(lines) >= 0.9 * _extent(all_lines)
    return keeps


def _extent(lines: np.ndarray) -> np.ndarray:
    """Returns how far the first line is from the last."""
    last = lines.shape[-1] - np.argmax(lines[..., ::-1], axis=-1)
    return np.where(lines.any(axis=-1), last - np.argmax(lines, axis=-1), 0)
