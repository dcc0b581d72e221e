"""Metrics as modules of Hugging Face `evaluate`, loaded from this package and never from the Hub.

Every folder here is one metric, and `evaluate.load("path/of/folder")` loads it as well as `load_metric` does.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

METRICS = ("bleu", "cider", "clip_score", "exact_match", "fid", "vqa_accuracy")


def load_metric(name: str, **kwargs: Any) -> Any:
    """Loads a metric.

    Args:
        name: One of `METRICS`.
        kwargs: Options of this metric, such as weights that it needs, or of `evaluate.Metric`.

    Returns:
        An `evaluate.Metric`. Its `compute(predictions=..., references=...)` gives numbers by name and, if the metric
        is a mean over samples, their `"scores"`. It keeps what is added in memory and writes no files.

    Raises:
        ImportError: `evaluate` is not installed.
        ValueError: There is no such metric, or no such option.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name}; known are {', '.join(METRICS)}.")
    try:
        from evaluate.loading import import_main_class  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Metrics need the package `evaluate`: pip install 'lavit-hf[evaluation]'") from error
    metric_class = import_main_class(f"{__name__}.{name}.{name}")
    # evaluate itself ignores what it does not know.
    options = {option for base in metric_class.__mro__ for option in inspect.signature(base.__init__).parameters}
    if unknown := set(kwargs) - options:
        raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}.")
    return metric_class(**{"keep_in_memory": True, **kwargs})


def mean_and_scores(name: str, scores: list[float]) -> dict[str, Any]:
    """Returns the mean by the metric's name, and every sample's score, from which intervals are computed.

    Raises:
        ValueError: There are no samples.
    """
    if not scores:
        raise ValueError(f"{name} needs at least one prediction.")
    return {name: math.fsum(scores) / len(scores), "scores": scores}


__all__ = ["METRICS", "load_metric", "mean_and_scores"]
