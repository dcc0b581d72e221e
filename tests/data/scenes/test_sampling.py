"""Scenes are a function of (seed, split, index), and the splits keep their promises."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from lavit_hf.data.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, object_coverage, sample_scene, scene_row
from lavit_hf.data.scenes.dice import Dice
from lavit_hf.data.scenes.world import relation_between

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
    from lavit_hf.data.scenes.sampling import _is_for_validation

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
    dice = Dice(1, 2)
    counts = Counter(dice.below(6) for _ in range(6000))
    assert set(counts) == set(range(6)) and max(counts.values()) < 1150 and min(counts.values()) > 850
    assert sorted(dice.shuffled(range(9))) == list(range(9))
    assert {dice.between(3, 4) for _ in range(50)} == {3, 4}
    orders = Counter(tuple(dice.shuffled("abc")) for _ in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60
