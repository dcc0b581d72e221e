import math

import numpy as np
import pytest

from lavit_hf.evaluation.intervals import bootstrap_interval, wilson_interval


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


def test_bad_input() -> None:
    for successes, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, total)
    for scores in ([], [0.5, math.nan]):
        with pytest.raises(ValueError, match="finite scores"):
            bootstrap_interval(scores)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)
