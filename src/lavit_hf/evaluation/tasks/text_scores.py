"""Scores texts by the metrics of their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measurement import Measurement, measure_mean
from .base import Record


def score_texts(name: str, metric: Any, records: Sequence[Record]) -> dict[str, Measurement]:
    """All numbers of a metric; its mean over samples has an interval.

    Args:
        name: Name of the metric.
        metric: The metric.
        records: With `prediction` and `references`.
    """
    result = metric.compute(
        predictions=[record["prediction"] for record in records],
        references=[record["references"] for record in records],
    )
    scores = result.pop("scores", None)
    found = {key: Measurement(float(value), len(records)) for key, value in result.items()}
    if scores is not None:
        found[name] = measure_mean(scores)
    return found


__all__ = ["score_texts"]
