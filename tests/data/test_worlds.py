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
    side = world.image_size // 8
    for index in range(10):
        picture, targets = world.labeled_picture("train", 0, index, side)
        assert np.array_equal(np.asarray(picture), np.asarray(world.render(world.sample_scene("train", 0, index))))
        assert set(targets.classes) == set(world.label_classes)
        for name, labels in targets.classes.items():
            assert labels.shape == (side**2,) and labels.min() >= 0 and labels.max() < world.label_classes[name]
        assert targets.is_object.any() and not targets.offset[~targets.is_object].any()
        varied, its = world.labeled_picture("train", 0, index, side, is_varied=True)
        assert varied.size == picture.size and set(its.classes) == set(targets.classes)
        again, _ = world.labeled_picture("train", 0, index, side, is_varied=True)
        assert np.array_equal(np.asarray(varied), np.asarray(again))
    differ = [world.labeled_picture("train", 0, index, side, is_varied=True)[1].classes for index in range(10)]
    assert any((labels == IGNORED).any() for classes in differ for labels in classes.values())


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
        text, changed = world.change_scene(scene, PortableRng(index))
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
