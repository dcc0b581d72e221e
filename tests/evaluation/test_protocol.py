"""The original's text handling gives what was recorded of it: questions, answers and accuracies."""

import json
from pathlib import Path

import pytest

from lavit_hf.evaluation.protocol import (
    cut_original_answer,
    normalize_original_answer,
    original_exact_match,
    original_question,
    original_vqa_accuracy,
)

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "evaluation-protocol.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("question", "asked"), RECORDED["questions"])
def test_questions(question: str, asked: str) -> None:
    assert original_question(question) == asked


@pytest.mark.parametrize(("text", "answer"), RECORDED["answers_cut"])
def test_cut_answers(text: str, answer: str) -> None:
    assert cut_original_answer(text) == answer


@pytest.mark.parametrize(("answer", "compared"), RECORDED["answers_normalized"])
def test_normalized_answers(answer: str, compared: str) -> None:
    assert normalize_original_answer(answer) == compared


@pytest.mark.parametrize("recorded", RECORDED["vqa_scores"])
def test_accuracies(recorded: dict) -> None:
    assert original_vqa_accuracy(recorded["prediction"], recorded["references"]) == recorded["accuracy"]


def test_questions_have_at_most_fifty_words() -> None:
    words = [f"w{number}" for number in range(60)]
    assert original_question(" ".join(words)) == " ".join(words[:50])
    assert original_question(" ".join([*words[:48], " ", "last"])) == " ".join([*words[:48], " "])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Two dogs\nQuestion: next", "two dogs"),
        ("red question: and so on", "red "),
        ("a Long answer: b", "a "),
        ("a long answer: b", "a long answer: b"),
        ("Question: what", "question: what"),  # only as it is written, before lower case
        ("red, white and blue", "red"),
        ("St. Louis", "st"),
    ],
)
def test_where_answers_end(text: str, answer: str) -> None:
    assert cut_original_answer(text) == answer


def test_openings_go_once_and_in_order() -> None:
    assert normalize_original_answer("it is on the table") == "table"
    assert normalize_original_answer("in it is red") == "it is red"
    assert normalize_original_answer("very very tall") == "very tall"
    assert normalize_original_answer("I do n't know.") == "unanswerable"


def test_exact_match_normalizes_the_prediction_alone() -> None:
    assert original_exact_match("The Two.", "2") == 100
    assert original_exact_match("two", "two") == 0
    assert original_exact_match("t-shirt", "t shirt") == 100


def test_too_few_answers() -> None:
    with pytest.raises(ValueError, match="4 at least"):
        original_vqa_accuracy("red", ["red"])
