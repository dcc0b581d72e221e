"""Measurements: numbers with a 95 % confidence interval, and how such intervals are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Lower and upper end of an interval."""

    low: float
    high: float


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Computes the interval of a proportion, for scores that are right or wrong.

    Unlike the textbook interval it stays within 0 and 1 and is right near them, and with few samples
    (Wilson, 1927; https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval).

    Args:
        successes: How many were right.
        total: Out of how many.
        confidence: Share of such intervals that hold the true proportion.

    Returns:
        The interval.

    Raises:
        ValueError: The numbers do not fit together, or `total` is 0.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} successes out of {total} is no proportion.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / total
    center = (rate + z**2 / (2 * total)) / (1 + z**2 / total)
    margin = z / (1 + z**2 / total) * (rate * (1 - rate) / total + z**2 / (4 * total**2)) ** 0.5
    # Both ends are exact where there is no doubt on one side; rounding would miss them.
    low = 0.0 if successes == 0 else center - margin
    high = 1.0 if successes == total else center + margin
    return Interval(low, high)


def bootstrap_interval(
    scores: Sequence[float], confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Computes the interval of a mean, for any scores: percentiles of the means of resampled scores.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        scores: One score per sample.
        confidence: Share of such intervals that hold the true mean.
        num_resamples: How often the scores are drawn again, with replacement.
        seed: The same seed gives the same interval.

    Returns:
        The interval.

    Raises:
        ValueError: There are no scores, or some are not finite.
    """
    _check_confidence(confidence)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("A bootstrap interval needs a list of finite scores, one at least.")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence has to lie between 0 and 1, {confidence} does not.")


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
        """Returns it in types that JSON has."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "value": self.value,
            "n": self.n,
            "unit": self.unit,
            "interval": interval,
            "is_share": self.is_share,
        }


def measure_share(successes: int, total: int, unit: str = "samples") -> Measurement:
    """Measures the share that is right, with Wilson's interval."""
    if total == 0:
        return Measurement(None, 0, unit, is_share=True)
    return Measurement(successes / total, total, unit, wilson_interval(successes, total), is_share=True)


def measure_mean(scores: Sequence[float], unit: str = "samples", is_share: bool = False) -> Measurement:
    """Measures a mean, with a bootstrap interval; with Wilson's if all scores are 0 or 1 and it is a share."""
    if is_share and set(scores) <= {0, 1}:
        return measure_share(round(sum(scores)), len(scores), unit)
    if not scores:
        return Measurement(None, 0, unit)
    mean = math.fsum(scores) / len(scores)
    return Measurement(mean, len(scores), unit, bootstrap_interval(scores), is_share)


def measure_correlation(first: Sequence[float], second: Sequence[float], unit: str = "samples") -> Measurement:
    """Measures Pearson's r, with the interval of Fisher's z; it has no value if either does not vary."""
    count = len(first)
    if count < 4 or len(set(first)) == 1 or len(set(second)) == 1:
        return Measurement(None, count, unit)
    r = float(np.corrcoef(first, second)[0, 1])
    middle, half = math.atanh(max(min(r, 1 - 1e-12), 1e-12 - 1)), _Z / math.sqrt(count - 3)
    return Measurement(r, count, unit, interval=(math.tanh(middle - half), math.tanh(middle + half)))


__all__ = [
    "Interval",
    "Measurement",
    "bootstrap_interval",
    "measure_correlation",
    "measure_mean",
    "measure_share",
    "wilson_interval",
]
