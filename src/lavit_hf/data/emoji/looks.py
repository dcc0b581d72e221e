"""Looks: other colors, proportions and outlines, with which scenes seem to be drawn by more artists than there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .world import LOOKS, ArrayRng, rng_for


def draw_looks(split: str, seed: int, indices: Sequence[int] | np.ndarray) -> Looks:
    """Draws the looks of scenes; those of each depend on its own index alone.

    Args:
        split: That of the scenes.
        seed: That of the scenes.
        indices: Those of the scenes.
    """
    return Looks.draw(rng_for(split, seed, indices, LOOKS), len(indices))


class Looks(NamedTuple):
    """How scenes look unlike the artists drew them: what differs between artists, as far as a program can draw it.

    Attributes:
        matrix: Of colors, `[scenes, 3, 3, 3]`.
        shift: Of colors, `[scenes, 3]`, as a share of white.
        stretch: Across and down, `[scenes, 3, 2]`, at most 1.
        is_outlined: Whether a dark line is drawn around it, `[scenes, 3]`.
        angle: More degrees.
        is_repainted: Whether the background has other colors, `[scenes]`.
        colors: From which to which color, `[scenes, 2, 3]`, of 255.
    """

    matrix: np.ndarray
    shift: np.ndarray
    stretch: np.ndarray
    is_outlined: np.ndarray
    angle: np.ndarray
    is_repainted: np.ndarray
    colors: np.ndarray

    @classmethod
    def draw(cls, rng: ArrayRng, count: int) -> Looks:
        """Draws the looks of `count` scenes, from random choices of each."""

        def some(number: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
            return np.stack([low + (high - low) * rng.unit() for _ in range(number)], axis=-1).reshape(count, number)

        is_recolored = some(3) < 0.5
        # Another hue, by a sum of uniform numbers, which is nearly normal.
        hue = 0.5 * (some(3, -1, 1) + some(3, -1, 1) + some(3, -1, 1)) * is_recolored
        saturation = np.where(is_recolored, some(3, 0.5, 1.4), 1.0)
        gain = np.where(is_recolored, some(3, 0.75, 1.25), 1.0)
        shift = 0.5 - 0.5 * gain + np.where(is_recolored, some(3, -0.1, 0.1), 0.0)
        matrix = gain[..., None, None] * _hue_matrix(hue, saturation)
        stretch = np.where((some(3) < 0.35)[..., None], some(6, 0.8, 1.0).reshape(count, 3, 2), 1.0)
        is_repainted = some(1)[:, 0] < 0.4
        colors = some(6, 0, 255).reshape(count, 2, 3)
        colors[:, 1] = np.where(some(1) < 0.5, colors[:, 1], colors[:, 0])
        return cls(matrix, shift, stretch, some(3) < 0.15, some(3, -12, 12), is_repainted, colors)

    def take(self, rows: slice) -> Looks:
        return Looks(*(array[rows] for array in self))


_GRAY = np.array([[0.299, 0.587, 0.114]] * 3)
_COSINE = np.array([[0.701, -0.587, -0.114], [-0.299, 0.413, -0.114], [-0.3, -0.588, 0.886]])
_SINE = np.array([[0.168, 0.330, -0.497], [-0.328, 0.035, 0.292], [1.25, -1.05, -0.203]])


def _hue_matrix(hue: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """The filter hueRotate of SVG (https://www.w3.org/TR/filter-effects/), mixed with gray."""
    turned = _GRAY + np.cos(hue)[..., None, None] * _COSINE + np.sin(hue)[..., None, None] * _SINE
    mixed = saturation[..., None, None]
    return mixed * turned + (1 - mixed) * _GRAY
