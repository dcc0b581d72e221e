"""Measurements: numbers with a 95 % confidence interval, and how such intervals are computed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Lower and upper end of an interval."""

    low: float
    high: float


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
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


def cluster_interval(
    right: Sequence[float],
    totals: Sequence[int],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Computes the interval of a share of things that come in clusters, such as the objects of scenes.

    Things of a cluster may be wrong together, so that they tell less than as many independent ones: whole clusters are
    drawn again, with replacement, and the interval is made of percentiles of their shares. If these do not vary, as
    where everything is right, it is Wilson's of as many independent things as there are clusters.

    Args:
        right: How many are right, or the sum of their scores, for each cluster.
        totals: Out of how many; clusters of none say nothing.
        confidence: Share of such intervals that hold the true share.
        num_resamples: How often the clusters are drawn again.
        seed: The same seed gives the same interval.

    Returns:
        The interval.

    Raises:
        ValueError: There is nothing in the clusters, or the numbers do not fit together.
    """
    _check_confidence(confidence)
    pairs = np.asarray([pair for pair in zip(right, totals, strict=True) if pair[1] > 0], dtype=np.float64)
    if not len(pairs) or not np.isfinite(pairs).all():
        raise ValueError("The interval of a share needs clusters with something in them, and finite scores.")
    # Clusters of the same numbers are alike: it is drawn how many there are of each kind.
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(pairs), counts / len(pairs), size=num_resamples)
    sums = drawn @ kinds
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    if math.isclose(low, high):
        share = math.fsum(pairs[:, 0]) / math.fsum(pairs[:, 1])
        return wilson_interval(share * len(pairs), len(pairs), confidence)
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


def measure_clusters(right: Sequence[int], totals: Sequence[int], unit: str) -> Measurement:
    """Measures the share of all things in clusters that is right, with the interval of [`cluster_interval`].

    Where no cluster has more than one thing, the interval is Wilson's.

    Args:
        right: How many are right, for each cluster.
        totals: Out of how many.
        unit: What the things are.
    """
    if max(totals, default=0) <= 1:
        return measure_share(sum(right), sum(totals), unit)
    interval = cluster_interval(right, totals)
    return Measurement(sum(right) / sum(totals), sum(totals), unit, interval, is_share=True)


def measure_mean(
    scores: Sequence[float],
    unit: str = "samples",
    is_share: bool = False,
    clusters: Sequence[Hashable] | None = None,
) -> Measurement:
    """Measures a mean, with a bootstrap interval; with Wilson's if all scores are 0 or 1 and it is a share.

    Args:
        scores: The scores.
        unit: What has them.
        is_share: Whether the mean is one of 1.
        clusters: What each score of a share belongs to, such as an image; if several belong to the same, the interval
            is that of [`cluster_interval`].
    """
    if is_share and clusters is not None and len(set(clusters)) < len(scores):
        of_cluster: dict[Hashable, list[float]] = {}
        for cluster, score in zip(clusters, scores, strict=True):
            of_cluster.setdefault(cluster, []).append(score)
        interval = cluster_interval([math.fsum(one) for one in of_cluster.values()], [*map(len, of_cluster.values())])
        return Measurement(math.fsum(scores) / len(scores), len(scores), unit, interval, is_share=True)
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
    "cluster_interval",
    "measure_clusters",
    "measure_correlation",
    "measure_mean",
    "measure_share",
    "wilson_interval",
]
