"""Numbers and their intervals."""

import math

import numpy as np
import pytest

from lavit_hf.evaluation.intervals import bootstrap_interval, wilson_interval
from lavit_hf.evaluation.measurement import measure_correlation, measure_mean, measure_share


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


def test_nothing_to_measure():
    for found in (measure_share(0, 0), measure_mean([]), measure_mean([], is_share=True)):
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
