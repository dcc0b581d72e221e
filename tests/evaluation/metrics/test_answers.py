"""VQA accuracy is the official one; record_vqa_evaluation.py says how its results were recorded."""

import json
from pathlib import Path

import pytest

from lavit_hf.evaluation.metrics import load_metric
from lavit_hf.evaluation.metrics.answers import normalize_answer

RECORDED = json.loads((Path(__file__).parent / "vqa_evaluation.json").read_text(encoding="utf-8"))
QUESTIONS = RECORDED["questions"]


def test_vqa_accuracy_is_the_official_one() -> None:
    result = load_metric("vqa_accuracy").compute(
        predictions=[question["prediction"] for question in QUESTIONS],
        references=[question["answers"] for question in QUESTIONS],
    )
    assert result["scores"] == pytest.approx([question["accuracy"] for question in QUESTIONS], abs=1e-11)
    assert result["vqa_accuracy"] == pytest.approx(RECORDED["overall"], abs=1e-11)


def test_normalization_is_the_official_one() -> None:
    for question in QUESTIONS:
        assert normalize_answer(question["prediction"]) == question["normalized"]


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [  # the examples of https://visualqa.org/evaluation.html
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("The two cats.", "2 cats"),
    ],
)
def test_published_examples(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(("humans", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_humans_who_agree(humans: int, accuracy: float) -> None:
    """min(humans / 3, 1), averaged over all ten ways to choose nine of the ten humans."""
    answers = ["blue"] * humans + ["red"] * (10 - humans)
    result = load_metric("vqa_accuracy").compute(predictions=["blue"], references=[answers])
    assert result == {"vqa_accuracy": pytest.approx(accuracy), "scores": [pytest.approx(accuracy)]}


def test_too_few_answers() -> None:
    with pytest.raises(ValueError, match="exact_match"):
        load_metric("vqa_accuracy").compute(predictions=["blue"], references=[["blue"]])


def test_exact_match() -> None:
    result = load_metric("exact_match").compute(
        predictions=["The cat.", "no", "Two", "t-shirt"], references=[["cat"], ["yes"], ["3", "2"], ["t shirt"]]
    )
    assert result == {"exact_match": 0.75, "scores": [1.0, 0.0, 1.0, 1.0]}
    with pytest.raises(ValueError, match="at least one prediction"):
        load_metric("exact_match").compute(predictions=[], references=[])
