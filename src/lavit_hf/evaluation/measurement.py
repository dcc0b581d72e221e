"""Numbers that say how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .intervals import bootstrap_interval, wilson_interval

_Z = 1.959963984540054  # 95 % of a normal distribution are within so many standard deviations


@dataclass(frozen=True)
class Measurement:
    """A number, what it was measured on, and its 95 % confidence interval.

    Attributes:
        value: The number; `None` if there is nothing to measure.
        n: How many of `unit`.
        unit: What was counted, such as `"samples"` or `"objects"`.
        interval: Lower and upper end; `None` for numbers that are no estimate of anything.
        is_share: Whether it is one of 1, to be read in percent.
    """

    value: float | None
    n: int
    unit: str = "samples"
    interval: tuple[float, float] | None = None
    is_share: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As what JSON knows."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "value": self.value,
            "n": self.n,
            "unit": self.unit,
            "interval": interval,
            "is_share": self.is_share,
        }


def measure_share(successes: int, total: int, unit: str = "samples") -> Measurement:
    """A share of things that are right, with Wilson's interval."""
    if total == 0:
        return Measurement(None, 0, unit, is_share=True)
    return Measurement(successes / total, total, unit, wilson_interval(successes, total), is_share=True)


def measure_mean(scores: Sequence[float], unit: str = "samples", is_share: bool = False) -> Measurement:
    """A mean over samples, with a bootstrap interval; that of shares which are all 0 or 1, with Wilson's."""
    if is_share and set(scores) <= {0, 1}:
        return measure_share(round(sum(scores)), len(scores), unit)
    if not scores:
        return Measurement(None, 0, unit)
    mean = math.fsum(scores) / len(scores)
    return Measurement(mean, len(scores), unit, bootstrap_interval(scores), is_share)


def measure_correlation(first: Sequence[float], second: Sequence[float], unit: str = "samples") -> Measurement:
    """Pearson's r, with the interval of Fisher's z; nothing if either does not vary."""
    count = len(first)
    if count < 4 or len(set(first)) == 1 or len(set(second)) == 1:
        return Measurement(None, count, unit)
    r = float(np.corrcoef(first, second)[0, 1])
    middle, half = math.atanh(max(min(r, 1 - 1e-12), 1e-12 - 1)), _Z / math.sqrt(count - 3)
    return Measurement(r, count, unit, interval=(math.tanh(middle - half), math.tanh(middle + half)))


__all__ = ["Measurement", "measure_correlation", "measure_mean", "measure_share"]
