"""Scenes to pictures."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, COLORS, SIZES, UNITS, Scene

MIN_IMAGE_SIZE = 16
_SAMPLES = 4  # per pixel and direction
_CROSS_ARM = 0.3  # half the width
_RING_HOLE = 0.55  # radius
_MOON_HOLE = (0.5, 0.78)  # center and radius of what is cut from a circle


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene, with smooth edges.

    Args:
        scene: What to draw.
        image_size: Width and height in pixels.

    Returns:
        An RGB picture, the same on every platform.

    Raises:
        ValueError: The picture would be too small, or a shape is unknown.
    """
    pixels = np.empty((image_size, image_size, 3), dtype=np.float64)
    pixels[:] = BACKGROUNDS[scene.background]
    for item, coverage in zip(scene.objects, object_coverage(scene, image_size), strict=True):
        pixels += coverage[:, :, None] * (np.array(COLORS[item.color], dtype=np.float64) - pixels)
    return Image.fromarray(np.floor(pixels + 0.5).astype(np.uint8))


def object_coverage(scene: Scene, image_size: int = 64) -> np.ndarray:
    """Which part of every pixel each object covers: the ground truth of a segmentation.

    Args:
        scene: Its objects, in order.
        image_size: Width and height in pixels.

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
    """Coverage of the pixels that a shape may touch, shifted within the first one by parts of 1/64."""
    units = SIZES[size]
    width = -(-(units * image_size + UNITS - 1) // UNITS)
    # Samples are in the middle of each pixel's 4 x 4 parts.
    samples = (np.arange(width * _SAMPLES) + 0.5) / _SAMPLES
    u, v = ((samples - shift / UNITS) * (2 * UNITS / (units * image_size)) - 1 for shift in (right_by, down_by))
    inside = is_inside(shape, u[None, :], v[:, None])
    return inside.reshape(width, _SAMPLES, width, _SAMPLES).mean(axis=(1, 3))


def is_inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points are inside a shape that fills the square from -1 to 1; `v` points down.

    Raises:
        ValueError: The shape is unknown.
    """
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
