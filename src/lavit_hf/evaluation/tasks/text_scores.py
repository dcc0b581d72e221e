"""Scores texts by the metrics of their data."""

from __future__ import annotations

from collections.abc import Sequence

from ..measurement import Measurement, measure_mean
from ..metrics import load_metric
from .base import Record


def score_texts(metric: str, records: Sequence[Record]) -> dict[str, Measurement]:
    """All numbers of a metric; its mean over samples has an interval.

    Args:
        metric: Name of the metric.
        records: With `prediction` and `references`.
    """
    result = load_metric(metric).compute(
        predictions=[record["prediction"] for record in records],
        references=[record["references"] for record in records],
    )
    scores = result.pop("scores", None)
    found = {name: Measurement(float(value), len(records)) for name, value in result.items()}
    if scores is not None:
        found[metric] = measure_mean(scores)
    return found


__all__ = ["score_texts"]
