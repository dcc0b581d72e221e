"""Numbers and their intervals."""

import math

import numpy as np
import pytest

from lavit_hf.evaluation.measurement import (
    bootstrap_interval,
    cluster_interval,
    measure_clusters,
    measure_correlation,
    measure_mean,
    measure_share,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_grows_with_confidence() -> None:
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(10, 10).high == 1.0
    wide = wilson_interval(3, 10, confidence=0.99)
    assert wide.low < low and wide.high > high


def test_bootstrap_interval_is_the_normal_one_for_many_scores() -> None:
    scores = np.random.default_rng(0).exponential(size=2000)
    margin = 1.96 * scores.std() / math.sqrt(len(scores))
    expected = (scores.mean() - margin, scores.mean() + margin)
    assert bootstrap_interval(scores.tolist()) == pytest.approx(expected, abs=0.1 * margin)


def test_bootstrap_interval_follows_its_seed() -> None:
    scores = [0.0, 0.3, 1.0, 1.0, 0.6]
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval([0.5] * 4) == (0.5, 0.5)


def test_intervals_of_clusters_hold_the_truth() -> None:
    """Regression: Wilson's interval takes what is wrong together for independent, and holds the truth too rarely."""
    generator = np.random.default_rng(0)
    hits = wilson = 0
    for _ in range(500):
        totals = generator.integers(1, 5, size=150)
        share = generator.choice([0.3, 0.9], size=150)  # of easy and of hard scenes; 0.6 on average
        right = generator.binomial(totals, share * (generator.random(150) < 0.9))  # of some scenes all is wrong
        low, high = cluster_interval(right.tolist(), totals.tolist(), num_resamples=1000)
        hits += low <= 0.54 <= high
        low, high = wilson_interval(int(right.sum()), int(totals.sum()))
        wilson += low <= 0.54 <= high
    assert 0.91 <= hits / 500 <= 0.98 and wilson / 500 < 0.9


def test_intervals_of_clusters_of_one_are_those_of_a_mean() -> None:
    right = np.random.default_rng(0).integers(0, 2, size=500).tolist()
    assert cluster_interval(right, [1] * 500) == pytest.approx(bootstrap_interval(right), abs=0.006)
    # How many things all clusters have changes nothing, nor do clusters of none.
    once, twice = cluster_interval([1, 2, 0], [2, 2, 3]), cluster_interval([2, 4, 0], [4, 4, 6])
    assert once == twice == cluster_interval([1, 2, 0, 0], [2, 2, 3, 0])


def test_intervals_of_clusters_are_never_points() -> None:
    assert cluster_interval([3, 2], [3, 2]) == wilson_interval(2, 2)
    assert cluster_interval([0, 0, 0], [3, 2, 1]) == wilson_interval(0, 3)
    low, high = cluster_interval([1, 2], [2, 4])
    assert low < 0.5 < high


def test_bad_input() -> None:
    for successes, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, total)
    for scores in ([], [0.5, math.nan]):
        with pytest.raises(ValueError, match="finite scores"):
            bootstrap_interval(scores)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)
    for right, totals in (([], []), ([0], [0]), ([math.nan], [1])):
        with pytest.raises(ValueError, match="clusters with something in them"):
            cluster_interval(right, totals)


def test_shares():
    found = measure_share(90, 100, "scenes")
    assert (found.value, found.n, found.unit) == (0.9, 100, "scenes")
    assert found.interval == wilson_interval(90, 100)
    assert found.to_dict() == {
        "value": 0.9,
        "n": 100,
        "unit": "scenes",
        "interval": list(wilson_interval(90, 100)),
        "is_share": True,
    }


def test_means():
    scores = [0.3, 0.6, 1.0]
    found = measure_mean(scores)
    assert found.value == math.fsum(scores) / 3 and found.interval == bootstrap_interval(scores)
    assert not found.is_share
    assert measure_mean([0.0, 1.0, 1.0], is_share=True).interval == wilson_interval(2, 3)
    assert measure_mean([0.3, 1.0], is_share=True).is_share


def test_things_of_a_cluster_are_measured_together():
    right, totals = [3, 0, 1], [3, 2, 1]
    found = measure_clusters(right, totals, "objects")
    assert (found.value, found.n, found.unit, found.is_share) == (4 / 6, 6, "objects", True)
    assert found.interval == cluster_interval(right, totals)
    assert measure_clusters([1, 0, 0], [1, 1, 0], "objects") == measure_share(1, 2, "objects")
    scores, images = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b", "b", "c"]
    mean = measure_mean(scores, "questions", is_share=True, clusters=images)
    assert mean.value == measure_mean(scores).value and mean.interval == found.interval
    alone = measure_mean(scores, "questions", is_share=True, clusters=range(6))
    assert alone == measure_mean(scores, "questions", is_share=True)


def test_nothing_to_measure():
    for found in (measure_share(0, 0), measure_mean([]), measure_mean([], is_share=True, clusters=[])):
        assert found.value is None and found.interval is None and found.n == 0


def test_correlations_have_intervals_that_hold_the_truth():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        first = generator.normal(size=30)
        second = 0.6 * first + 0.8 * generator.normal(size=30)  # r is 0.6
        low, high = measure_correlation(list(first), list(second)).interval
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_correlations_at_the_edges():
    assert measure_correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]).value == pytest.approx(1)
    assert measure_correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).value is None
    assert measure_correlation([1, 2, 3], [1, 2, 3]).value is None
