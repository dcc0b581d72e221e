"""The accuracy of VQAv2, OK-VQA and VizWiz, whose questions have ten human answers each."""

from __future__ import annotations

from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics import mean_and_scores
from lavit_hf.evaluation.metrics.answers import mean_agreement, normalize_answer, strip_answer

_DESCRIPTION = """
VQA accuracy: an answer that at least three of the other humans gave counts in full, averaged over leaving out each
human. Answers are normalized as by the official evaluation, https://visualqa.org/evaluation.html.
"""
_CITATION = """
@inproceedings{goyal2017making,
  title={Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author={Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2017}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: One answer per question.
    references: A list of human answers per question, ten in the benchmarks, four at least.
Returns:
    vqa_accuracy: Mean over questions, between 0 and 1.
    scores: The accuracy of each question.
Example:
    >>> metric = load_metric("vqa_accuracy")
    >>> metric.compute(predictions=["two"], references=[["2"] * 2 + ["3"] * 8])["vqa_accuracy"]
    0.6
"""


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Accuracy of one answer.

    Like the official code, this normalizes nothing if all humans gave the same answer.

    Args:
        prediction: The answer to judge.
        answers: The answers of humans.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: There are too few answers for a right one to reach 1.
    """
    prediction, answers = strip_answer(prediction), [strip_answer(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    return mean_agreement(prediction, answers)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        return mean_and_scores("vqa_accuracy", list(map(vqa_accuracy, predictions, references)))
