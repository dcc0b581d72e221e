"""The accuracy of GQA and of other questions with one right answer."""

from __future__ import annotations

from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics import mean_and_scores
from lavit_hf.evaluation.metrics.answers import normalize_answer

_DESCRIPTION = """
Exact match: the share of answers that equal a reference, both normalized like the answers of VQAv2
(https://visualqa.org/evaluation.html). This is the accuracy of GQA.
"""
_CITATION = """
@inproceedings{hudson2019gqa,
  title={{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
  author={Hudson, Drew A. and Manning, Christopher D.},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2019}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: One answer per question.
    references: A list of right answers per question, often of one.
Returns:
    exact_match: Mean over questions, between 0 and 1.
    scores: 1.0 or 0.0 for each question.
Example:
    >>> metric = load_metric("exact_match")
    >>> metric.compute(predictions=["The cat.", "no"], references=[["cat"], ["yes"]])["exact_match"]
    0.5
"""


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 if an answer equals one of the right ones after normalization, else 0.0."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://cs.stanford.edu/people/dorarad/gqa/evaluate.html"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        return mean_and_scores("exact_match", list(map(exact_match, predictions, references)))
