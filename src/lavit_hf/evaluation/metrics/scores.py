"""What metrics that are a mean over samples return."""

from __future__ import annotations

import math
from typing import Any


def mean_and_scores(name: str, scores: list[float]) -> dict[str, Any]:
    """The mean under the metric's name, and every sample's score, from which intervals are computed.

    Raises:
        ValueError: There are no samples.
    """
    if not scores:
        raise ValueError(f"{name} needs at least one prediction.")
    return {name: math.fsum(scores) / len(scores), "scores": scores}


__all__ = ["mean_and_scores"]
