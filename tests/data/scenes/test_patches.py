"""Labels of patches agree with what is drawn there."""

import numpy as np
import pytest

from lavit_hf.data.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, object_coverage, sample_scene
from lavit_hf.data.scenes.patches import NO_SHAPE, NO_SIZE, label_patches

SCENE = Scene("gray", (SceneObject("ring", "red", "small", 16, 16), SceneObject("moon", "cyan", "large", 48, 16)))


def test_labels_of_a_scene() -> None:
    labels = label_patches(SCENE, 8)
    shapes = labels.shape.reshape(8, 8)
    assert shapes[1, 1] == shapes[2, 2] == SHAPES.index("ring")  # in its hole
    assert shapes[1, 5] == SHAPES.index("moon")
    assert (shapes[4:] == NO_SHAPE).all() and (labels.size.reshape(8, 8)[4:] == NO_SIZE).all()
    assert labels.color[labels.is_object].min() >= 0
    assert set(labels.color[~labels.is_object]) == {len(COLORS) + list(BACKGROUNDS).index("gray")}
    assert set(labels.size[labels.shape == SHAPES.index("moon")]) == {list(SIZES).index("large")}


def test_offsets_point_at_the_middle() -> None:
    labels = label_patches(SCENE, 8)
    middles = (np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) + 0.5) / 8
    pointed_at = (middles + labels.offset)[labels.shape == SHAPES.index("ring")]
    assert np.allclose(pointed_at, 16 / 64)
    assert not labels.offset[~labels.is_object].any()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_labels_follow_what_is_drawn(split: str) -> None:
    for index in range(50):
        scene = sample_scene(split, 3, index)
        labels = label_patches(scene, 8)
        cover = object_coverage(scene).reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64)
        strongest = cover.argmax(axis=0)
        for patch in np.flatnonzero(cover.max(axis=0) > 0.5):
            item = scene.objects[strongest[patch]]
            assert SHAPES[labels.shape[patch]] == item.shape and list(COLORS)[labels.color[patch]] == item.color
