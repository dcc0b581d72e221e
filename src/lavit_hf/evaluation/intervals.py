"""Placeholder of this branch: intervals are made elsewhere, behind the same names."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    z = 1.959963984540054
    share = successes / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    values = np.asarray(scores, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
