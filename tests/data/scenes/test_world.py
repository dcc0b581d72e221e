"""Scenes as JSON, how objects stand to each other, and how scenes are drawn at random."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from lavit_hf.data.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    SceneObject,
    object_coverage,
    sample_scene,
    scene_row,
)
from lavit_hf.data.scenes.world import BACKGROUNDS, SIZES, PortableRng, relation_between


def thing(x: int, y: int, **changes) -> SceneObject:
    return SceneObject(**{"shape": "ring", "color": "red", "size": "small", "x": x, "y": y, **changes})


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 6 and len(COLORS) >= 6 and len(SIZES) == 2 and len(BACKGROUNDS) >= 3


def test_every_shape_and_color_is_held_out_once() -> None:
    assert sorted(shape for shape, _ in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert sorted(color for _, color in HELD_OUT_PAIRS) == sorted(COLORS)


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_json_round_trip(split: str) -> None:
    for index in range(30):
        scene = sample_scene(split, 1, index)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background": "plaid"}, "'plaid' is no background"),
        ({"objects": [{"shape": "ring"}]}, "Not a scene"),
        ({"objects": [vars(thing(1, 2, shape="dog"))]}, "'dog' is no shape"),
        ({"objects": [vars(thing(1, 2, color="mauve"))]}, "'mauve' is no color"),
        ({"objects": [vars(thing(1, 2, size="vast"))]}, "'vast' is no size"),
        ({"objects": [vars(thing(1, 99))]}, "y must be an integer from 0 to 64"),
        ({"objects": [vars(thing(1.5, 2))]}, "x must be an integer"),
        ({"objects": None}, "Not a scene"),
    ],
)
def test_what_is_no_scene(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene.from_dict({"background": "white", "objects": [], **changes})


def test_relations() -> None:
    middle = thing(32, 32)
    assert relation_between(thing(10, 40), middle) == "left of"
    assert relation_between(thing(50, 20), middle) == "right of"
    assert relation_between(thing(30, 5), middle) == "above"
    assert relation_between(thing(44, 60), middle) == "below"
    assert relation_between(thing(5, 5), middle) is None
    assert relation_between(thing(30, 30), middle) is None


SPLITS = ["train", "validation", "held_out"]
SCENES = {split: [sample_scene(split, 0, index) for index in range(400)] for split in SPLITS}

# Of everything but the PNG's compression, which zlib may change. If a change of the world is intended, change these.
DIGESTS = {
    "train": "8d1d2a81b2a2e310",
    "validation": "a51d817efb3eeae0",
    "held_out": "acfb4cf1524c8d15",
}


def digest(split: str) -> str:
    rows = [scene_row(split, 5, index) for index in range(20)]
    return hashlib.sha256(json.dumps([{**row, "image": None} for row in rows]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_same_everywhere(split: str) -> None:
    assert digest(split) == DIGESTS[split]


def test_seed_split_and_index_all_count() -> None:
    keys = [("train", 0, 0), ("train", 1, 0), ("train", 0, 1), ("validation", 0, 0), ("held_out", 0, 0)]
    assert len({sample_scene(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_can_be_told_apart(split: str) -> None:
    for scene in SCENES[split]:
        assert len({item.pair for item in scene.objects}) == len(scene.objects)
        assert scene.background not in {item.color for item in scene.objects}
        facing = [
            relation_between(a, b) is not None for a in scene.objects for b in scene.objects if (a.x, a.y) < (b.x, b.y)
        ]
        assert sum(facing) == len(scene.objects) - 1
        # Also after a blur: not even the pixels around the objects overlap.
        boxes = [(mask > 0).astype(int) for mask in object_coverage(scene)]
        grown = [sum(box[1 + y : 63 + y, 1 + x : 63 + x] for x in (-1, 0, 1) for y in (-1, 0, 1)) > 0 for box in boxes]
        assert np.sum(grown, axis=0).max() <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_objects_stand_in_the_middle_of_quarters(split: str) -> None:
    for scene in SCENES[split]:
        places = [(item.x, item.y) for item in scene.objects]
        assert set(places) <= {(16, 16), (48, 16), (16, 48), (48, 48)} and len(set(places)) == len(places)


@pytest.mark.parametrize("split", SPLITS)
def test_everything_occurs(split: str) -> None:
    counts = Counter(len(scene.objects) for scene in SCENES[split])
    assert min(counts[number] for number in (1, 2, 3)) > 90
    objects = [item for scene in SCENES[split] for item in scene.objects]
    for attribute, values in (("shape", SHAPES), ("color", COLORS), ("size", ("small", "large"))):
        shares = Counter(getattr(item, attribute) for item in objects)
        assert set(shares) == set(values)
        assert min(shares.values()) > 0.6 * len(objects) / len(values)
    assert min(Counter(scene.background for scene in SCENES[split]).values()) > 50


def test_held_out_pairs_are_held_out() -> None:
    for split in ("train", "validation"):
        assert not any(item.pair in HELD_OUT_PAIRS for scene in SCENES[split] for item in scene.objects)
    for scene in SCENES["held_out"]:
        assert sum(item.pair in HELD_OUT_PAIRS for item in scene.objects) == 1
    assert {item.pair for scene in SCENES["held_out"] for item in scene.objects} >= HELD_OUT_PAIRS


def test_no_scene_is_in_two_splits() -> None:
    from lavit_hf.data.scenes.world import _is_for_validation

    for seed in range(3):
        for index in range(100):
            assert not _is_for_validation(sample_scene("train", seed, index))
            assert _is_for_validation(sample_scene("validation", seed, index))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'test' is no split of the scenes; expected one of train, validation"):
        sample_scene("test", 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_scene("train", -1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_scene("train", 0, -1)
    with pytest.raises(TypeError):
        sample_scene("train", 0.5, 0)


def test_dice_are_fair_and_stable() -> None:
    rng = PortableRng(1, 2)
    counts = Counter(rng.below(6) for _ in range(6000))
    assert set(counts) == set(range(6)) and max(counts.values()) < 1150 and min(counts.values()) > 850
    assert sorted(rng.shuffled(range(9))) == list(range(9))
    assert {rng.between(3, 4) for _ in range(50)} == {3, 4}
    orders = Counter(tuple(rng.shuffled("abc")) for _ in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60
