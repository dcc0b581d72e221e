"""Captions say what is there, and are read back exactly."""

import pytest

from lavit_hf.data.scenes import HELD_OUT_PAIRS, CaptionError, Scene, SceneObject, captions_of, facts_of, parse_caption
from lavit_hf.data.scenes.dataset import CAPTION
from lavit_hf.data.scenes.language import Facts, ObjectFacts, RelationFacts, write_caption
from lavit_hf.data.scenes.sampling import dice_for, sample_scene

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
    written = [write_caption(scene, dice_for("train", 0, index, CAPTION)) for index in range(300)]
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
        caption = write_caption(scene, dice_for("train", 4, index, CAPTION))
        assert not any(f"{color} {shape}" in caption for shape, color in HELD_OUT_PAIRS)
