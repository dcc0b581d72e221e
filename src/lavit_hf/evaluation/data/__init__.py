"""Data to evaluate on: one small reader per format, all giving the same samples."""

from .reading import read_data
from .samples import EvaluationData, EvaluationSample

__all__ = ["EvaluationData", "EvaluationSample", "read_data"]
