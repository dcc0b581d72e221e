"""Scenes of emoji, drawn at random."""

from dataclasses import replace

import numpy as np
import pytest

from lavit_hf.data.emoji import (
    BACKGROUNDS,
    PLACES,
    SIZES,
    SPLITS,
    UNSEEN_ARTIST,
    Scene,
    SceneArrays,
    facts_of,
    is_held_out,
    load_pack,
    redraw,
    sample_scene,
    sample_scenes,
    world,
)
from lavit_hf.data.emoji.world import ArrayRng, held_out_pairs, visible_on

RECORDED = {
    "train": ("orange", [("eggplant", "fluent-emoji-flat", 290, 39), ("apple", "fluent-emoji-flat", 74, 27)]),
    "validation": ("purple", [("clover", "noto-v1", 124, 27), ("tractor", "noto-v1", 287, 36)]),
    "held_out": (
        "blue",
        [("toilet", "emojione", 96, 40), ("cat", "emojione", 68, 26), ("anchor", "emojione", 294, 40)],
    ),
    "unseen_artist": ("gray", [("duck", "twemoji", 92, 38)]),
    "single": ("purple", [("scorpion", "noto", 182, 73)]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_its_own_index_alone(split: str) -> None:
    many = sample_scenes(split, 3, np.arange(100)).to_scenes()
    assert many[40:60] == sample_scenes(split, 3, range(40, 60)).to_scenes()
    assert many[7] == sample_scene(split, 3, 7)
    assert many != sample_scenes(split, 4, np.arange(100)).to_scenes()
    assert len(set(many)) == 100


def test_recorded_scenes() -> None:
    """Scenes never change: what a checkpoint was trained or measured on."""
    for split, (background, objects) in RECORDED.items():
        scene = sample_scene(split, 0, 5)
        assert scene.background == background
        assert [(item.concept, item.artist, item.x, item.side) for item in scene.objects] == objects


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_possible(split: str) -> None:
    pack, backgrounds = load_pack(), list(BACKGROUNDS)
    for scene in sample_scenes(split, 0, np.arange(300)).to_scenes():
        assert 1 <= len(scene.objects) <= 3
        places = [PLACES.index(item.place) for item in scene.objects]
        assert places == sorted(set(places))
        assert len({item.concept for item in scene.objects}) == len(places)
        for item in scene.objects:
            assert (item.place == "middle") == (item.size == "big")
            concept, artist = pack.concepts.index(item.concept), pack.artists.index(item.artist)
            assert pack.is_drawn[concept, artist]
            assert visible_on()[concept, artist, backgrounds.index(scene.background)]
            low, high = SIZES[item.size]
            assert low <= item.side <= (high if item.size != "big" else 94)
            if item.place != "middle":  # all of it is in its quarter
                row, column = divmod(PLACES.index(item.place), 2)
                for place, cell in ((item.x, column), (item.y, row)):
                    assert abs(place / 4 - 24 - 48 * cell) + 1.13 * item.side / 2 <= 24.5


def test_splits_differ_as_they_say() -> None:
    of = {split: sample_scenes(split, 0, np.arange(400)).to_scenes() for split in SPLITS}
    for split, scenes in of.items():
        assert all(scene.has_held_out_pair == (split == "held_out") for scene in scenes)
        artists = {item.artist for scene in scenes for item in scene.objects}
        assert (
            (artists == {UNSEEN_ARTIST})
            if split == "unseen_artist"
            else (len(artists) == 7 and UNSEEN_ARTIST not in artists)
        )
    assert all(len(scene.objects) == 1 and scene.objects[0].size == "big" for scene in of["single"])
    assert 100 < sum(scene.screenshot > 0 for scene in of["single"]) < 300


def test_no_scene_is_in_training_and_in_validation() -> None:
    def what(split: str, seed: int) -> set:
        return {
            (scene.background, *((item.concept, item.artist, item.size, item.place) for item in scene.objects))
            for scene in sample_scenes(split, seed, np.arange(4000)).to_scenes()
        }

    train, validation = what("train", 0), what("validation", 1)
    # Scenes of one object are few, so that two seeds of one split have some in common.
    assert not train & validation
    assert train & what("train", 1)


def test_a_tenth_of_pairs_is_held_out() -> None:
    pairs = held_out_pairs()
    assert 0.08 < pairs.sum() / (len(pairs) * (len(pairs) - 1)) < 0.12
    assert (pairs == pairs.T).all() and not pairs.diagonal().any()
    assert pairs.any(axis=1).all()  # every concept has a partner
    assert not is_held_out("dog", "dog") and not is_held_out("dog", "unknown")


def test_all_concepts_are_about_equally_common() -> None:
    scenes = sample_scenes("train", 0, np.arange(20_000))
    count = np.bincount(scenes.concept[scenes.concept >= 0], minlength=len(load_pack().concepts))
    assert count.min() > 60 and count.max() < 5 * count.min()
    number = np.bincount((scenes.concept >= 0).sum(axis=1)) / len(scenes)
    assert number[1:] == pytest.approx([0.29, 0.41, 0.3], abs=0.06)


def test_another_artist_draws_the_same() -> None:
    scenes = [sample_scene("train", 3, index) for index in range(300)]
    redrawn = [redraw(scene, "noto") for scene in scenes]
    assert redrawn.count(None) < 120  # most can be
    for before, after in zip(scenes, redrawn, strict=True):
        if after is None:
            continue
        assert {item.artist for item in after.objects} == {"noto"} and facts_of(after) == facts_of(before)
        assert after == replace(
            before, objects=tuple(replace(item, artist="noto") for item in before.objects)
        )  # where, how large, turned, flipped
    assert not world._is_for_validation(SceneArrays.from_scenes([scene for scene in redrawn if scene])).any()
    validation = [redraw(sample_scene("validation", 3, index), "noto") for index in range(100)]
    assert world._is_for_validation(SceneArrays.from_scenes([scene for scene in validation if scene])).all()


def test_what_an_artist_cannot_draw() -> None:
    pack = load_pack()
    concept, artist = (int(numbers[0]) for numbers in np.nonzero(~pack.is_drawn))
    scene = next(
        found
        for found in (sample_scene("train", 0, index) for index in range(20000))
        if pack.concepts[concept] in [item.concept for item in found.objects]
    )
    assert redraw(scene, pack.artists[artist]) is None
    with pytest.raises(ValueError, match="'picasso' is no artist of a scene of emoji"):
        redraw(scene, "picasso")


def test_dictionaries() -> None:
    for split in SPLITS:
        scenes = sample_scenes(split, 2, np.arange(20))
        for scene in scenes.to_scenes():
            assert Scene.from_dict(scene.to_dict()) == scene
        again = SceneArrays.from_scenes(scenes.to_scenes())
        assert all(
            np.array_equal(mine, its) for mine, its in zip(vars(again).values(), vars(scenes).values(), strict=True)
        )


def test_wrong_dictionaries() -> None:
    values = sample_scene("train", 0, 0).to_dict()
    with pytest.raises(ValueError, match="Not a scene"):
        Scene.from_dict({"background": "white"})
    with pytest.raises(ValueError, match="'black' is no background"):
        Scene.from_dict({**values, "background": "black"})
    with pytest.raises(ValueError, match="'goblin' is no concept"):
        Scene.from_dict({**values, "objects": [{**values["objects"][0], "concept": "goblin"}]})
    with pytest.raises(ValueError, match="x must be an integer"):
        Scene.from_dict({**values, "objects": [{**values["objects"][0], "x": 1.5}]})


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'test' is no split"):
        sample_scene("test", 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_scene("train", -1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_scenes("train", 0, [3, -1])


def test_random_choices() -> None:
    rng = ArrayRng(1, np.arange(10_000))
    for limit in (2, 7, 100):
        values = rng.below(limit)
        assert values.min() == 0 and values.max() == limit - 1
        assert values.mean() == pytest.approx((limit - 1) / 2, rel=0.05)
    units = rng.unit()
    assert units.min() >= 0 and units.max() < 1 and units.std() == pytest.approx(12**-0.5, rel=0.03)
    # Neighbors have nothing in common, nor have choices one after the other.
    assert abs(np.corrcoef(units[:-1], units[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(units, rng.unit())[0, 1]) < 0.04
    assert ArrayRng(1, 5).below(1000) == ArrayRng(1, np.arange(10)).below(1000)[5]
