"""Worlds: what training and evaluation know of them."""

import numpy as np
import pytest
from PIL import Image

from lavit_hf.data.scenes import HELD_OUT_PAIRS, PortableRng, Scene, change_scene, repaint, sample_scene, write_layout
from lavit_hf.data.worlds import IGNORED, WORLDS, World, find_world

worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


@worlds
def test_rows_tell_the_truth(world: World) -> None:
    for split in world.splits:
        row = world.row(split, 0, 3)
        scene = world.sample_scene(split, 0, 3)
        assert world.scene_from_dict(row["scene"]) == scene
        facts = world.facts_of(scene)
        assert facts == world.parse_caption(row["text"]) == world.facts_of(world.judge(world.render(scene)))
        assert world.num_objects(scene) == len(facts.objects)
        assert 0 < world.object_area(scene) < 1
    assert world.parse_caption("a nice picture") is None
    assert world.make_dataset(world.splits[1], 2)[1]["text"] == world.row(world.splits[1], 0, 1)["text"]


@worlds
def test_parts_of_facts_have_units(world: World) -> None:
    facts = world.facts_of(world.sample_scene("train", 0, 0))
    assert {*world.parts_of(facts), "object_count"} == set(world.fact_units)
    assert all(isinstance(hash(item), int) for part in world.parts_of(facts).values() for item in part)
    assert set(world.parts_of(None)) == set(world.parts_of(facts))
    assert set(world.fact_units.values()) <= {"scenes", "objects", "relations"}


@worlds
def test_labeled_pictures(world: World) -> None:
    side, indices = world.image_size // 8, np.arange(10)
    made = world.labeled_pictures("train", 0, indices, side, np.zeros(10, dtype=bool))
    for index, scene in enumerate(made.scenes):
        assert scene == world.sample_scene("train", 0, index)
        assert np.array_equal(made.pixels[index], np.asarray(world.render(scene)))
    assert set(made.classes) == set(world.label_classes)
    for name, labels in made.classes.items():
        assert labels.shape == (10, side**2) and labels.min() >= 0 and labels.max() < world.label_classes[name]
    assert made.is_object.any(axis=1).all() and not made.offset[~made.is_object].any()


@worlds
def test_a_labeled_picture_depends_on_its_own_index_and_looks_alone(world: World) -> None:
    side, is_varied = world.image_size // 8, np.arange(10) % 3 == 0
    made = world.labeled_pictures("train", 0, np.arange(10), side, is_varied)
    for index in (7, 3, 6):
        alone = world.labeled_pictures("train", 0, np.array([index]), side, is_varied[[index]])
        assert alone.scenes == [made.scenes[index]]
        assert np.array_equal(alone.pixels[0], made.pixels[index])
        for labels, its in (
            (made.offset, alone.offset),
            *zip(made.classes.values(), alone.classes.values(), strict=True),
        ):
            assert np.array_equal(its[0], labels[index])
    varied = world.labeled_pictures("train", 0, np.arange(10), side, np.ones(10, dtype=bool))
    assert not np.array_equal(varied.pixels[1], made.pixels[1]) and np.array_equal(varied.pixels[3], made.pixels[3])
    assert any((labels == IGNORED).any() for labels in varied.classes.values())


@worlds
def test_texts_have_every_word(world: World) -> None:
    texts = list(world.make_texts(30))
    words = " ".join(texts)
    assert len(texts) > 100 and "Question: What color is the background? Answer: " in words
    for index in range(30):
        assert world.write_layout(world.sample_scene("train", 0, index)) in texts


@worlds
def test_a_change_is_another_scene(world: World) -> None:
    for index in range(10):
        scene = world.sample_scene("train", 0, index)
        text, changed, _ = world.change_scene(scene, PortableRng(index))
        assert text and world.facts_of(changed) != world.facts_of(scene)
        assert isinstance(world.render(changed), Image.Image)


def test_an_unknown_world() -> None:
    with pytest.raises(ValueError, match="no world 'words'; there are scenes, emoji"):
        find_world("words")


def test_changed_scenes_keep_their_objects() -> None:
    for index in range(20):
        scene = sample_scene("train", 0, index)
        text, changed = change_scene(scene, PortableRng(index))
        assert changed.objects == scene.objects and text == f"on a {changed.background} background"
        assert changed.background not in {scene.background, *(item.color for item in scene.objects)}
        *objects, background = write_layout(changed).split(", ")
        assert background == f"{changed.background} background" and len(objects) == len(scene.objects)


def test_repainted_scenes_show_no_pair() -> None:
    """Their colors are far from all that have names, so that they show no pair that is held out."""
    assert HELD_OUT_PAIRS
    for index in range(20):
        scene: Scene = sample_scene("train", 0, index)
        seen = find_world("scenes").judge(repaint(scene, PortableRng(index)))
        assert seen.background == "unknown" or not seen.has_held_out_pair
