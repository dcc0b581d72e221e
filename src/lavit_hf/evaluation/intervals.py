"""How sure is a number? Confidence intervals for proportions and means."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Interval of a proportion, for scores that are right or wrong.

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
    """Interval of a mean, for scores of any distribution: percentiles of the means of resampled scores.

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


__all__ = ["Interval", "bootstrap_interval", "wilson_interval"]
