"""Pictures of scenes: drawn, labeled patch by patch, and read back by a program that uses no model."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, COLORS, SHAPES, SIZES, UNITS, UNKNOWN, PortableRng, Scene, SceneObject

MIN_IMAGE_SIZE = 16
_SAMPLES = 4  # per pixel and direction
_CROSS_ARM = 0.3  # half the width
_RING_HOLE = 0.55  # radius
_MOON_HOLE = (0.5, 0.78)  # center and radius of what is cut from a circle


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene, with smooth edges: an RGB picture, the same on every platform.

    Raises:
        ValueError: The picture would be too small, or a shape is unknown.
    """
    pixels = np.empty((image_size, image_size, 3), dtype=np.float64)
    pixels[:] = BACKGROUNDS[scene.background]
    for item, coverage in zip(scene.objects, object_coverage(scene, image_size), strict=True):
        pixels += coverage[:, :, None] * (np.array(COLORS[item.color], dtype=np.float64) - pixels)
    return Image.fromarray(np.floor(pixels + 0.5).astype(np.uint8))


_OTHER = 60.0  # distance in RGB from which on a color is another one


def repaint(scene: Scene, rng: PortableRng, image_size: int = 64) -> Image.Image:
    """Draws a scene in colors that are far from all that scenes have, and so shows no pair that is held out.

    Args:
        scene: What to draw.
        rng: Chooses the colors.
        image_size: Width and height in pixels.

    Returns:
        An RGB picture.
    """
    known = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float64)
    pixels = np.empty((image_size, image_size, 3))
    pixels[:] = background = _other_color(rng, known)
    for coverage in object_coverage(scene, image_size):
        color = _other_color(rng, np.vstack([known, background]))
        pixels += coverage[:, :, None] * (color - pixels)
    return Image.fromarray(np.floor(pixels + 0.5).astype(np.uint8))


def _other_color(rng: PortableRng, known: np.ndarray) -> np.ndarray:
    while True:
        color = np.array([rng.below(256) for _ in range(3)], dtype=np.float64)
        if np.linalg.norm(known - color, axis=1).min() > _OTHER:
            return color


def object_coverage(scene: Scene, image_size: int = 64) -> np.ndarray:
    """Computes which part of every pixel each object covers: the ground truth of a segmentation.

    Returns:
        Numbers from 0 to 1, `[objects, image_size, image_size]`.

    Raises:
        ValueError: The picture would be too small, or a shape is unknown.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {image_size}.")
    result = np.zeros((len(scene.objects), image_size, image_size))
    for target, item in zip(result, scene.objects, strict=True):
        # Where the object's box starts, in pixels, and how far into that pixel in 1/64 of one.
        (left, right_by), (top, down_by) = (
            divmod((place - SIZES[item.size] // 2) * image_size, UNITS) for place in (item.x, item.y)
        )
        stamp = _stamp(item.shape, item.size, image_size, right_by, down_by)
        target[top : top + len(stamp), left : left + len(stamp)] = stamp
    return result


@functools.lru_cache(maxsize=1024)
def _stamp(shape: str, size: str, image_size: int, right_by: int, down_by: int) -> np.ndarray:
    """Computes the coverage of pixels that a shape may touch, shifted within the first one by parts of 1/64."""
    units = SIZES[size]
    width = -(-(units * image_size + UNITS - 1) // UNITS)
    # Samples are in the middle of each pixel's 4 x 4 parts.
    samples = (np.arange(width * _SAMPLES) + 0.5) / _SAMPLES
    u, v = ((samples - shift / UNITS) * (2 * UNITS / (units * image_size)) - 1 for shift in (right_by, down_by))
    inside = is_inside(shape, u[None, :], v[:, None])
    return inside.reshape(width, _SAMPLES, width, _SAMPLES).mean(axis=(1, 3))


def is_inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Tells which points are inside a shape that fills the square from -1 to 1; `v` points down."""
    box = np.maximum(np.abs(u), np.abs(v)) <= 1
    circle = u * u + v * v <= 1
    if shape == "square":
        return box
    if shape == "circle":
        return circle
    if shape == "triangle":
        return box & (2 * np.abs(u) <= v + 1)
    if shape == "cross":
        return box & (np.minimum(np.abs(u), np.abs(v)) <= _CROSS_ARM)
    if shape == "ring":
        return circle & (u * u + v * v >= _RING_HOLE**2)
    if shape == "moon":
        center, radius = _MOON_HOLE
        return circle & ((u - center) ** 2 + v * v >= radius**2)
    raise ValueError(f"{shape!r} cannot be drawn.")


_VISIBLE = 0.3  # share of a patch that an object's box has to cover

NO_SHAPE, NO_SIZE = len(SHAPES), len(SIZES)


class PatchLabels(NamedTuple):
    """Labels of a picture's patches, in raster order, `[num_patches]` each.

    Attributes:
        shape: Index in `SHAPES` of the object there, or `NO_SHAPE`.
        color: Index in `COLORS` of that object; where there is none, that of the background in `BACKGROUNDS`, after
            those of `COLORS`.
        size: Index in `SIZES`, or `NO_SIZE`.
        offset: From the middle of the patch to that of the object, across and down, in sides of the picture,
            `[num_patches, 2]`; 0 where there is none.
    """

    shape: np.ndarray
    color: np.ndarray
    size: np.ndarray
    offset: np.ndarray

    @property
    def is_object(self) -> np.ndarray:
        """Where there is an object, `[num_patches]`."""
        return self.shape != NO_SHAPE


def label_patches(scene: Scene, patches_per_side: int) -> PatchLabels:
    """Labels the patches of a scene's picture, `patches_per_side` across and down.

    A patch shows the object whose box covers most of it, holes included, if that is at least 30 %.
    """
    edges = np.arange(patches_per_side + 1) / patches_per_side
    middle = (edges[:-1] + edges[1:]) / 2
    covers, offsets = [np.full((patches_per_side, patches_per_side), _VISIBLE)], [np.zeros(2)]
    for item in scene.objects:
        half = SIZES[item.size] / 2 / UNITS
        lines = [_overlap(edges, place / UNITS - half, place / UNITS + half) for place in (item.y, item.x)]
        covers.append(np.outer(*lines))
        offsets.append(np.array([item.x, item.y]) / UNITS)
    strongest = np.argmax(covers, axis=0).ravel()  # 0 is the background
    background = len(COLORS) + list(BACKGROUNDS).index(scene.background)
    shapes = [NO_SHAPE, *(SHAPES.index(item.shape) for item in scene.objects)]
    colors = [background, *(list(COLORS).index(item.color) for item in scene.objects)]
    sizes = [NO_SIZE, *(list(SIZES).index(item.size) for item in scene.objects)]
    places = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2)
    offset = np.where(strongest[:, None] > 0, np.array(offsets)[strongest] - places, 0.0)
    shape, color, size = (np.array(values)[strongest] for values in (shapes, colors, sizes))
    return PatchLabels(shape, color, size, offset)


def _overlap(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """Computes the share of each interval that lies between two places."""
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(covered, 0, None) / np.diff(edges)


# A pixel is part of an object from this share of the way on between the background and the nearest color.
_OBJECT_FROM = 0.4
# Smaller spots, in pixels of 64 x 64, are noise. The smallest object has 150.
_SPECK = 30
# How far a color may be from one of the palette, in RGB; those are 129 and more from each other.
_MAX_COLOR_ERROR = 90.0
# What cannot be seen: objects whose color is closer than this to that of the background.
_MIN_CONTRAST = 60.0
# How alike an outline and a shape must be to call it by its name, from 0 to 1. Shapes that are none of ours (a star,
# an X, a heart, a bar) reach 0.88, ours after an autoencoder's blur and noise hardly ever less than 0.92.
_MIN_LIKENESS = 0.9
_MARGIN = 40  # pixels around the picture, so that a shape may be compared beyond its edge


class _Outline(NamedTuple):
    """How an object of one shape and size looks, `[side, side]`, and the middle of what is seen of it."""

    shape: str
    size: str
    coverage: np.ndarray
    energy: float
    middle: tuple[float, float]


def judge(image: Image.Image | np.ndarray) -> Scene:
    """Reads a picture.

    Args:
        image: A square picture of a scene, of any size: of PIL, or an array `[height, width, 3]` of `uint8`.

    Returns:
        The scene, with as many objects as were found, even if none. `facts_of` makes it comparable with a caption.

    Raises:
        ValueError: The picture is not square, or the array is no picture.
    """
    pixels = _smooth(_read(image))
    background, base = _find_background(pixels)
    colors = {name: np.array(color, dtype=float) for name, color in COLORS.items()}
    colors = {name: color for name, color in colors.items() if np.linalg.norm(color - base) > _MIN_CONTRAST}
    threshold = _OBJECT_FROM * min(np.linalg.norm(color - base) for color in colors.values())
    labels = _label(np.linalg.norm(pixels - base, axis=-1) > threshold)
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    objects = [_read_object(pixels, labels, number, base, colors) for number in numbers[counts >= _SPECK]]
    return Scene(background, tuple(sorted(objects, key=lambda item: (item.y, item.x))))


def _read(image: Image.Image | np.ndarray) -> np.ndarray:
    """Returns a picture as numbers, `[64, 64, 3]`."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"Expected [height, width, 3] of uint8, got {list(image.shape)} of {image.dtype}.")
        image = Image.fromarray(image)
    if image.width != image.height:
        raise ValueError(f"Pictures of scenes are square, got {image.width} x {image.height} pixels.")
    image = image.convert("RGB")
    if image.width != UNITS:
        # To average is what the renderer does, too.
        method = Image.Resampling.BOX if image.width > UNITS else Image.Resampling.BICUBIC
        image = image.resize((UNITS, UNITS), method)
    return np.asarray(image, dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Blurs the first two dimensions by (1, 2, 1) / 4, against noise. Outlines are blurred in the same way."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if axis == other else (0, 0) for other in range(values.ndim)], mode="edge")
        length = values.shape[axis]
        before, here, after = (np.take(padded, range(start, start + length), axis=axis) for start in range(3))
        values = (before + 2 * here + after) / 4
    return values


def _find_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Finds the background's name, and its color in this picture, by a vote of the pixels at the edges."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    palette = np.array(list(BACKGROUNDS.values()), dtype=float)
    votes = np.linalg.norm(edge[:, None] - palette, axis=-1).argmin(axis=1)
    winner = int(np.bincount(votes).argmax())
    measured = np.median(edge[votes == winner], axis=0)
    is_known = np.linalg.norm(palette[winner] - measured) <= _MAX_COLOR_ERROR
    return list(BACKGROUNDS)[winner] if is_known else UNKNOWN, measured


def _label(mask: np.ndarray) -> np.ndarray:
    """Numbers the connected parts of a mask from 1 on, with gaps; 0 is what is not in the mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        neighbors = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, functools.reduce(np.maximum, neighbors, labels), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _read_object(
    pixels: np.ndarray, labels: np.ndarray, number: int, base: np.ndarray, colors: dict[str, np.ndarray]
) -> SceneObject:
    mine = labels == number
    padded = np.pad(mine, 1)
    core = mine & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    measured = np.median(pixels[core if core.any() else mine], axis=0)
    color = min(colors, key=lambda name: float(np.linalg.norm(colors[name] - measured)))
    if np.linalg.norm(colors[color] - measured) > _MAX_COLOR_ERROR:
        color = UNKNOWN
    # How much of each pixel is the object's: the way from the background to its color that the pixel has gone.
    way = measured - base
    coverage = np.clip((pixels - base) @ way / max(way @ way, 1.0), 0, 1)
    coverage[(labels > 0) & ~mine] = 0
    shape, size, x, y = _fit_outline(mine, coverage)
    return SceneObject(shape, color, size, x, y)


def _fit_outline(mine: np.ndarray, coverage: np.ndarray) -> tuple[str, str, int, int]:
    """Finds the shape and size that are most alike, and the center."""
    rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
    middle = [(line[0] + line[-1] + 1) / 2 for line in (columns, rows)]
    # What is less than half covered counts only nearby: the rest is noise.
    near = np.zeros_like(coverage)
    window = tuple(slice(max(line[0] - 2, 0), line[-1] + 3) for line in (rows, columns))
    near[window] = coverage[window]
    canvas, energy = np.pad(near, _MARGIN), (near**2).sum()
    best = (0.0, UNKNOWN, "small", 0, 0)
    for outline in _outlines():
        side = len(outline.coverage)
        left, top = (round(place - its) for place, its in zip(middle, outline.middle, strict=True))
        places = np.lib.stride_tricks.sliding_window_view(canvas, (side, side))
        places = places[top + _MARGIN - 1 : top + _MARGIN + 2, left + _MARGIN - 1 : left + _MARGIN + 2]
        # Less sensitive to blur than intersection over union: a blurred ring is no square to it.
        likeness = 2 * np.tensordot(places, outline.coverage) / (energy + outline.energy)
        down, across = np.unravel_index(likeness.argmax(), likeness.shape)
        x, y = left + int(across) - 1 + side // 2, top + int(down) - 1 + side // 2
        best = max(best, (float(likeness.max()), outline.shape, outline.size, x, y))
    score, shape, size, x, y = best
    x, y = (min(max(place, 0), UNITS) for place in (x, y))
    return shape if score >= _MIN_LIKENESS else UNKNOWN, size, x, y


@functools.cache
def _outlines() -> tuple[_Outline, ...]:
    center = UNITS // 2
    found = []
    for shape in SHAPES:
        for size, side in SIZES.items():
            scene = Scene("white", (SceneObject(shape, "red", size, center, center),))
            part = slice(center - side // 2 - 2, center + side // 2 + 2)
            coverage = _smooth(object_coverage(scene, UNITS)[0])[part, part]
            lines = (np.flatnonzero((coverage > _OBJECT_FROM).any(axis=axis)) for axis in (0, 1))
            across, down = ((line[0] + line[-1] + 1) / 2 for line in lines)
            found.append(_Outline(shape, size, coverage, (coverage**2).sum(), (across, down)))
    return tuple(found)
