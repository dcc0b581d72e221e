"""Captions, layouts, questions and changes of scenes of emoji, and facts read back."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lavit_hf.data.emoji import (
    CaptionError,
    Facts,
    ObjectFacts,
    Scene,
    SceneObject,
    ask_questions,
    captions_of,
    change_scene,
    facts_of,
    is_held_out,
    load_pack,
    parse_caption,
    sample_scenes,
    write_caption,
    write_layout,
)
from lavit_hf.data.emoji.language import CHANGES, KINDS, with_article
from lavit_hf.data.scenes import PortableRng


def item(concept: str, place: str, size: str = "medium") -> SceneObject:
    return SceneObject(concept, "noto", size, place, 40, 96, 96)


TWO = Scene("pink", (item("dog", "top left"), item("grapes", "top right", "small")))


@pytest.mark.parametrize("split", ["validation", "held_out", "unseen_artist", "single"])
def test_every_caption_says_everything(split: str) -> None:
    for scene in sample_scenes(split, 0, np.arange(60)).to_scenes():
        captions = captions_of(scene)
        assert len(set(captions)) == len(captions) in (4, 8, 16, 24)
        for caption in captions:
            assert parse_caption(caption) == facts_of(scene), caption


def test_every_concept_can_be_named() -> None:
    for number, concept in enumerate(load_pack().concepts):
        other = load_pack().concepts[number - 1]
        scene = Scene("orange", (item(concept, "top left", "small"), item(other, "bottom left")))
        assert all(parse_caption(caption) == facts_of(scene) for caption in captions_of(scene))


def test_wordings() -> None:
    captions = captions_of(TWO)
    assert "a dog at the top left and small grapes at the top right on a pink background" in captions
    assert "there are small grapes at the top right and a dog at the top left on a pink background" in captions
    assert "a pink background with a dog left of small grapes at the top" in captions
    assert "a picture of small grapes right of a dog at the top on a pink background" in captions
    assert write_layout(TWO) == "dog top left, small grapes top right, pink background"
    assert {write_layout(TWO, PortableRng(seed)) for seed in range(20)} == {
        "dog top left, small grapes top right, pink background",
        "small grapes top right, dog top left, pink background",
    }
    assert write_caption(TWO, PortableRng(0)) in captions
    alone = Scene("orange", (SceneObject("ant", "noto", "big", "middle", 80, 192, 192),))
    assert captions_of(alone)[0] == "a big ant on an orange background"


def test_articles() -> None:
    found = [with_article(name) for name in ("ant", "unicorn", "hourglass", "umbrella", "house", "bread", "grapes")]
    assert found == ["an ant", "a unicorn", "an hourglass", "an umbrella", "a house", "bread", "grapes"]


def test_captions_are_read_whatever_their_case_and_spaces() -> None:
    assert parse_caption("  A Dog   at the top left on a BLUE background. ") == Facts(
        "blue", (ObjectFacts("top left", "medium", "dog"),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a dog on a background",
        "a goblin at the top left on a pink background",
        "a dog at the left on a pink background",
        "a medium dog at the top left on a pink background",
        "a dog at the top left on a black background",
        "a dog left of a cat on a pink background",
        "a dog left of a cat on the right on a pink background",
        "a dog above a cat at the top on a pink background",
        "a dog at the top left, and a cat at the top right on a pink background",
        "a dog at the top left on a pink background on a pink background",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(CaptionError):
        parse_caption(text)


def answer_by_facts(scene: Scene, question: str) -> str:
    """Answers a question in another way than it was made: from the scene's facts."""
    facts = facts_of(scene)
    by_place = {one.place: one for one in facts.objects}
    by_name = {one.concept: one for one in facts.objects}
    words = question.rstrip("?")
    if words == "What color is the background":
        return facts.background
    if words == "How many things are there":
        return ("zero", "one", "two", "three")[len(facts.objects)]
    if words.startswith("Is the background "):
        return "yes" if words.split()[-1] == facts.background else "no"
    if words.startswith(("What is at the ", "What is in the ")):
        found = by_place.get(words[len("What is at the ") :])
        return phrase(found) if found else "nothing"
    if words.startswith("Where "):
        place = by_name[words.split(" the ")[1]].place
        return "in the middle" if place == "middle" else f"at the {place}"
    if words.startswith(("Is there ", "Are there ")):
        name = words.split(" there ")[1]
        return "yes" if any(name == with_article(one) for one in by_name) else "no"
    for relation in ("left of", "right of", "above", "below"):
        if f" {relation} the " in words:
            first, second = words.split(f" {relation} the ")
            if first.startswith("What "):
                (found,) = [one for one in facts.objects if relates(one.place, relation, by_name[second].place)]
                return phrase(found)
            name = first.split(" the ")[1]
            return "yes" if relates(by_name[name].place, relation, by_name[second].place) else "no"
    raise AssertionError(question)


def phrase(found: ObjectFacts) -> str:
    return with_article(found.concept, *([] if found.size == "medium" else [found.size]))


def relates(first: str, relation: str, second: str) -> bool:
    (row, column), (its_row, its_column) = first.split(), second.split()
    if relation in ("left of", "right of"):
        return row == its_row and (column, its_column) == (
            ("left", "right") if relation == "left of" else ("right", "left")
        )
    return column == its_column and (row, its_row) == (("top", "bottom") if relation == "above" else ("bottom", "top"))


def test_answers_are_right_and_of_all_kinds() -> None:
    kinds, yes = Counter(), Counter()
    for split in ("validation", "held_out", "single"):
        for number, scene in enumerate(sample_scenes(split, 1, np.arange(150)).to_scenes()):
            for question, answer, kind in ask_questions(scene, PortableRng(number)):
                assert answer == answer_by_facts(scene, question), (question, answer)
                kinds[kind] += 1
                yes[answer] += kind == "yes_no"
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 100
    assert 0.4 < yes["yes"] / kinds["yes_no"] < 0.6


def test_texts_name_no_held_out_pair() -> None:
    names = load_pack().concepts
    for number, scene in enumerate(sample_scenes("train", 0, np.arange(300)).to_scenes()):
        texts = [question for question, _, _ in ask_questions(scene, PortableRng(number))]
        present = [one.concept for one in scene.objects]
        for text in texts:
            said = [name for name in names if text in (f"Is there {with_article(name)}?", f"Are there {name}?")]
            assert not any(is_held_out(a, b) for a in said for b in present)
        change = change_scene(scene, PortableRng(number))
        after = [one.concept for one in change.scene.objects]
        assert not any(is_held_out(a, b) for a in after for b in {*present, *after})


def test_changes_change_one_thing() -> None:
    kinds = Counter()
    for number, scene in enumerate(sample_scenes("validation", 0, np.arange(200)).to_scenes()):
        text, after, kind = change_scene(scene, PortableRng(number))
        kinds[kind] += 1
        if kind == "background":
            assert after != scene and replace(after, background=scene.background) == scene
            assert text == f"the same on {with_article('background', after.background)}"
        elif kind == "remove":
            (gone,) = set(scene.objects) - set(after.objects)
            assert len(after.objects) == len(scene.objects) - 1 and text == f"the same without the {gone.concept}"
        else:
            ((old, new),) = [pair for pair in zip(scene.objects, after.objects, strict=True) if pair[0] != pair[1]]
            assert replace(new, concept=old.concept) == old and after.background == scene.background
            assert text.endswith(f"{with_article(new.concept)} instead of the {old.concept}")
    assert set(kinds) == set(CHANGES) and kinds["replace"] > 60


def test_a_kind_of_change_can_be_chosen() -> None:
    assert change_scene(TWO, PortableRng(0), "remove").kind == "remove"
    with pytest.raises(ValueError, match="no kind of change"):
        change_scene(TWO, PortableRng(0), "add")
    alone = Scene("pink", TWO.objects[:1])
    with pytest.raises(ValueError, match="allows no change of the kind remove"):
        change_scene(alone, PortableRng(0), "remove")
