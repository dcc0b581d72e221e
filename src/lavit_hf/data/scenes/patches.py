"""What every patch of a picture shows: dense labels, for vision encoders that are trained on scenes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .world import BACKGROUNDS, COLORS, SHAPES, SIZES, UNITS, Scene

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
    """Labels the patches of a scene's picture.

    A patch shows the object whose box covers most of it, holes included, if that is at least 30 %.

    Args:
        scene: What is on the picture.
        patches_per_side: Their number, across and down.

    Returns:
        Labels of all patches.
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
    """Which share of each interval lies between two places."""
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(covered, 0, None) / np.diff(edges)
