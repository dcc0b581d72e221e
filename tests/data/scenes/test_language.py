"""Captions say what is there and are read back exactly; questions have one right answer."""

import re
from collections import Counter, defaultdict

import pytest

from lavit_hf.data.scenes import (
    HELD_OUT_PAIRS,
    CaptionError,
    Question,
    Scene,
    SceneObject,
    captions_of,
    facts_of,
    parse_caption,
)
from lavit_hf.data.scenes.dataset import CAPTION
from lavit_hf.data.scenes.language import KINDS, Facts, ObjectFacts, RelationFacts, ask_questions, write_caption
from lavit_hf.data.scenes.world import QUESTIONS, relation_between, rng_for, sample_scene

SCENES = [sample_scene(split, 2, index) for split in ("train", "held_out") for index in range(300)]
CIRCLE, SQUARE = ObjectFacts("small", "red", "circle"), ObjectFacts("large", "blue", "square")
MOON = ObjectFacts("small", "cyan", "moon")


def test_every_caption_of_a_scene_is_read_back() -> None:
    for scene in SCENES:
        captions = captions_of(scene)
        assert len(captions) == len(set(captions)) == {1: 4, 2: 8, 3: 16}[len(scene.objects)]
        facts = facts_of(scene)
        assert len(facts.objects) == len(scene.objects) == len(facts.relations) + 1
        for caption in captions:
            assert parse_caption(caption) == facts


def test_other_scenes_have_other_facts() -> None:
    assert len({facts_of(scene) for scene in SCENES}) == len({captions_of(scene)[0] for scene in SCENES})


def test_all_wordings_are_written() -> None:
    scene = next(scene for scene in SCENES if len(scene.objects) == 3)
    written = [write_caption(scene, rng_for("train", 0, index, CAPTION)) for index in range(300)]
    assert set(written) == set(captions_of(scene))


def test_facts_in_words() -> None:
    expected = Facts("white", (SQUARE, CIRCLE), (RelationFacts(CIRCLE, "left of", SQUARE),))
    for caption in (
        "a small red circle left of a large blue square on a white background",
        "there is a large blue square right of a small red circle on a white background",
        "A white background with a  small red circle left of a large blue square.\n",
        "a picture of a small red circle left of a large blue square on a white background",
    ):
        assert parse_caption(caption) == expected
    three = parse_caption(
        "a small red circle left of a large blue square and above a small cyan moon on a black background"
    )
    assert three.relations == (RelationFacts(CIRCLE, "above", MOON), RelationFacts(CIRCLE, "left of", SQUARE))
    chain = parse_caption(
        "a small red circle left of a large blue square that is below a small cyan moon on a black background"
    )
    assert chain.relations == (RelationFacts(MOON, "above", SQUARE), RelationFacts(CIRCLE, "left of", SQUARE))


def test_an_object_twice_is_not_an_object_once() -> None:
    once, twice = (
        parse_caption(f"a small red circle{more} on a white background")
        for more in ("", " left of a small red circle")
    )
    assert once != twice and len(twice.objects) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog on a white background",
        "a small red circle",
        "a small red circle on a purple background",
        "a small red circle left of a large blue square",
        "a red small circle on a white background",
        "a small red circle left of on a white background",
        "a small red circle on a white background on a white background",
        "a small red circle left of a large blue square near a small cyan moon on a white background",
    ],
)
def test_what_is_no_caption(text: str) -> None:
    with pytest.raises(CaptionError, match="Not a caption"):
        parse_caption(text)


def test_scenes_without_captions() -> None:
    items = [SceneObject("ring", "red", "small", x, y) for x, y in ((12, 12), (50, 50))]
    with pytest.raises(ValueError, match="do not face each other"):
        captions_of(Scene("white", tuple(items)))
    with pytest.raises(ValueError, match="Only scenes as"):
        captions_of(Scene("white", ()))
    assert facts_of(Scene("white", tuple(items))).relations == ()


def test_held_out_pairs_are_not_mentioned() -> None:
    for index in range(300):
        scene = sample_scene("train", 4, index)
        caption = write_caption(scene, rng_for("train", 4, index, CAPTION))
        assert not any(f"{color} {shape}" in caption for shape, color in HELD_OUT_PAIRS)


NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3}
RELATION = r"(left of|right of|above|below)"


def asked(split: str, count: int) -> list[tuple[Scene, Question]]:
    return [
        (scene, question)
        for index in range(count)
        for scene in [sample_scene(split, 0, index)]
        for question in ask_questions(scene, rng_for(split, 0, index, QUESTIONS))
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
