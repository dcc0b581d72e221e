"""Random choices that are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")


class Dice:
    """Draws from the raw output of PCG64.

    NumPy promises the same raw output on every platform and in every version; of `Generator.integers` and the like it
    does not (NEP 19).

    Args:
        key: Non-negative integers. Each sequence of them is an independent stream.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, limit: int) -> int:
        """An integer from 0 to `limit - 1`."""
        # The bias is limit / 2**64: far below anything that could be noticed.
        return (self._bits.random_raw() * limit) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[_Item]) -> _Item:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """A shuffled copy (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result
