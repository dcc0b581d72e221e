"""The dataset that lavit-scenes learns from in stage 2."""

import importlib
from pathlib import Path

import pytest

from lavit_hf.data.scenes import place_of, write_layout

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "worlds"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("make_dataset")


def make_rows(example, count=200, **options) -> list[dict]:
    arguments = example.Arguments("unused", num_rows=count, **options)
    return [example.make_row(arguments, index) for index in range(count)]


def test_shares_of_rows(example):
    rows = make_rows(example, question_share=0.3, layout_share=0.2, change_share=0.1)
    found = {
        "questions": sum(row["messages"] is not None for row in rows),
        "layouts": sum(row["prompt"] is not None and len(row["images"]) == 1 for row in rows),
        "changes": sum(len(row["images"]) == 2 for row in rows),
        "captions": sum(row["prompt"] is None and row["text"] is not None for row in rows),
    }
    assert sum(found.values()) == len(rows)
    assert found == pytest.approx({"questions": 60, "layouts": 40, "changes": 20, "captions": 80}, abs=25)
    assert make_rows(example, 3) == make_rows(example, 3)


def test_layouts_say_everything_in_reading_order(example):
    scene = example.choose_scene(example.Arguments("unused", many_share=1.0), 0)
    *objects, background = write_layout(scene).split(", ")
    assert background == f"{scene.background} background"
    for text, item in zip(objects, scene.objects, strict=True):
        assert text == f"{item.size} {item.color} {item.shape} {place_of(item)}"


def test_half_of_the_conversations_end_with_the_layout(example):
    rows = make_rows(example, question_share=1.0, layout_share=0.0, change_share=0.0)
    questions = [[turn["content"][-1]["text"] for turn in row["messages"][::2]] for row in rows]
    assert 60 < sum(asked[-1] == "What is where?" for asked in questions) < 140
    assert not any("What is where?" in asked[:-1] for asked in questions)
    assert all(row["messages"][0]["content"][0]["type"] == "image" for row in rows)


def test_claims_are_about_as_common_as_other_questions(example):
    rows = make_rows(example, question_share=1.0, layout_share=0.0, change_share=0.0)
    for row in rows:
        questions = [turn["content"][-1]["text"] for turn in row["messages"][::2]]
        assert len(set(questions)) == len(questions)
        claims = sum(question.startswith("Is ") for question in questions)
        assert 1 <= claims <= 4 == len(questions) - claims - (questions[-1] == "What is where?")


def test_more_rows_about_many_objects(example):
    def count(**options) -> int:
        arguments = example.Arguments("unused", num_rows=100, **options)
        return sum(len(example.choose_scene(arguments, index).objects) == 3 for index in range(100))

    assert count(many_share=1.0) == 100
    assert count() < 60 < count(many_share=0.7) < 100
