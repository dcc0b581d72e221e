"""Answers are right, judged by reading the question; yes and no are as common."""

import re
from collections import Counter, defaultdict

import pytest

from lavit_hf.data.scenes import HELD_OUT_PAIRS, Question, Scene
from lavit_hf.data.scenes.questions import KINDS, ask_questions
from lavit_hf.data.scenes.sampling import QUESTIONS, dice_for, sample_scene
from lavit_hf.data.scenes.world import relation_between

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3}
RELATION = r"(left of|right of|above|below)"


def asked(split: str, count: int) -> list[tuple[Scene, Question]]:
    return [
        (scene, question)
        for index in range(count)
        for scene in [sample_scene(split, 0, index)]
        for question in ask_questions(scene, dice_for(split, 0, index, QUESTIONS))
    ]


@pytest.fixture(scope="module", params=["train", "held_out"])
def questions(request: pytest.FixtureRequest) -> list[tuple[Scene, Question]]:
    return asked(request.param, 1500)


def answer(scene: Scene, question: str) -> str:
    """Answers from the question's words and the scene; a question with several answers fails."""

    def find(**wanted):
        return [item for item in scene.objects if all(getattr(item, name) == value for name, value in wanted.items())]

    def one(**wanted):
        (item,) = find(**wanted)
        return item

    yes_no = {True: "yes", False: "no"}
    if question == "What color is the background?":
        return scene.background
    if found := re.fullmatch(r"What color is the (\w+)\?", question):
        return one(shape=found[1]).color
    if found := re.fullmatch(r"What shape is the (\w+) object\?", question):
        return one(color=found[1]).shape
    if found := re.fullmatch(r"What size is the (\w+) (\w+)\?", question):
        return one(color=found[1], shape=found[2]).size
    if question == "How many objects are there?":
        return {value: name for name, value in NUMBERS.items()}[len(scene.objects)]
    if found := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return {value: name for name, value in NUMBERS.items()}[len(find(color=found[1]))]
    if found := re.fullmatch(r"How many (crosse|\w+)s are there\?", question):
        return {value: name for name, value in NUMBERS.items()}[len(find(shape=found[1].replace("crosse", "cross")))]
    if found := re.fullmatch(rf"What is {RELATION} the (\w+) (\w+)\?", question):
        other = one(color=found[2], shape=found[3])
        (item,) = [item for item in scene.objects if item != other and relation_between(item, other) == found[1]]
        return f"{item.color} {item.shape}"
    if found := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        item = one(color=found[1], shape=found[2])
        return f"{'bottom' if item.y > 32 else 'top'} {'right' if item.x > 32 else 'left'}"
    if found := re.fullmatch(r"What is in the (top|bottom) (left|right)\?", question):
        (item,) = [
            item
            for item in scene.objects
            if (item.y > 32) == (found[1] == "bottom") and (item.x > 32) == (found[2] == "right")
        ]
        return f"{item.color} {item.shape}"
    if found := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        return yes_no[bool(find(color=found[1], shape=found[2]))]
    if found := re.fullmatch(r"Is the background (\w+)\?", question):
        return yes_no[scene.background == found[1]]
    if found := re.fullmatch(rf"Is the (\w+) (\w+) {RELATION} the (\w+) (\w+)\?", question):
        first, second = one(color=found[1], shape=found[2]), one(color=found[4], shape=found[5])
        return yes_no[relation_between(first, second) == found[3]]
    found = re.fullmatch(r"Is the (\w+) (\w+)\?", question)
    return yes_no[one(shape=found[1]).color == found[2]]


def test_answers_are_right(questions) -> None:
    for scene, question in questions:
        assert question.answer == answer(scene, question.question), (scene, question)


def test_all_kinds_are_asked_once_per_scene(questions) -> None:
    kinds = Counter(question.kind for _, question in questions)
    assert set(kinds) == set(KINDS)
    assert kinds["yes_no"] == kinds["count"] == kinds["background"] == kinds["size"] == kinds["place"] == 1500
    assert kinds["relation"] == sum(len(scene.objects) > 1 for scene, q in questions if q.kind == "yes_no")
    assert min(kinds["color"], kinds["shape"]) > 1300


def test_yes_and_no_are_as_common_in_every_wording(questions) -> None:
    answers = defaultdict(list)
    for _, question in questions:
        if question.kind == "yes_no":
            wording = (question.question.split()[1], bool(re.search(RELATION, question.question)))
            answers[wording if wording[0] == "there" or wording[1] else "background" in question.question].append(
                question.answer == "yes"
            )
    assert len(answers) == 4
    for found in answers.values():
        assert len(found) > 180
        assert abs(sum(found) / len(found) - 0.5) < 4 * 0.5 / len(found) ** 0.5


def test_no_answer_can_be_guessed(questions) -> None:
    answers = defaultdict(Counter)
    for _, question in questions:
        answers[question.kind][question.answer] += 1
    limits = {
        "color": 0.3,
        "shape": 0.3,
        "size": 0.6,
        "count": 0.63,
        "background": 0.4,
        "place": 0.2,
        "relation": 0.1,
        "yes_no": 0.55,
    }
    for kind, limit in limits.items():
        assert max(answers[kind].values()) / answers[kind].total() < limit, answers[kind]


def test_held_out_pairs_are_mentioned_only_where_they_occur() -> None:
    words = [(f"{color} {shape}", f"the {shape} {color}?") for shape, color in HELD_OUT_PAIRS]

    def mentioned(split: str) -> list[str]:
        texts = [f"{question.question} {question.answer}" for _, question in asked(split, 800)]
        return [text for text in texts if any(word in text for pair in words for word in pair)]

    assert not mentioned("train")
    # That it is mentioned must not give away that it is there.
    existence = [text for text in mentioned("held_out") if text.startswith("Is there")]
    assert {text.split()[-1] for text in existence} == {"yes", "no"}
