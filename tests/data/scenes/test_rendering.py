"""Pictures show what their scenes say."""

import hashlib

import numpy as np
import pytest

from lavit_hf.data.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, object_coverage, render
from lavit_hf.data.scenes.sampling import sample_scene


def single(shape: str, size: str = "large", x: int = 30, y: int = 34) -> Scene:
    return Scene("gray", (SceneObject(shape, "blue", size, x, y),))


def test_colors_are_those_of_the_palette() -> None:
    for index in range(20):
        scene = sample_scene("train", 0, index)
        pixels = np.asarray(render(scene))
        coverage = object_coverage(scene)
        assert (pixels[coverage.sum(axis=0) == 0] == BACKGROUNDS[scene.background]).all()
        for item, mask in zip(scene.objects, coverage, strict=True):
            assert (pixels[mask == 1] == COLORS[item.color]).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_fill_their_size_and_are_not_small(shape: str, size: str) -> None:
    scene = single(shape, size)
    (mask,) = object_coverage(scene) > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    half = SIZES[size] // 2
    assert (rows[0], rows[-1], columns[0]) == (34 - half, 33 + half, 30 - half)
    assert columns[-1] == 29 + half or shape == "moon"
    assert mask.sum() > 140
    # Wherever it stands, it is part of three patches of 8 x 8 pixels in each direction.
    for x in range(28, 36):
        for y in range(28, 36):
            (mask,) = object_coverage(single(shape, size, x, y)) > 0
            patches = mask.reshape(8, 8, 8, 8).any(axis=(1, 3))
            assert patches.any(axis=0).sum() >= 3 - (shape == "moon") and patches.any(axis=1).sum() >= 3
            assert patches.sum() >= 5


def test_resolution_does_not_matter() -> None:
    scene = sample_scene("train", 0, 4)
    small = np.asarray(render(scene, 64), dtype=float)
    for factor in (2, 3):
        large = np.asarray(render(scene, 64 * factor), dtype=float)
        averaged = large.reshape(64, factor, 64, factor, 3).mean(axis=(1, 3))
        assert np.abs(averaged - small).max() < 40 and np.abs(averaged - small).mean() < 0.5
    assert render(scene, 50).size == (50, 50)
    assert object_coverage(scene, 50).shape == (len(scene.objects), 50, 50)


def test_same_pixels_everywhere() -> None:
    pixels = b"".join(np.asarray(render(sample_scene("train", 0, index))).tobytes() for index in range(10))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "df33e0dec49bb3d2"


def test_moving_an_object_moves_its_pixels() -> None:
    here, there = (object_coverage(single("moon", x=x, y=y))[0] for x, y in ((30, 34), (33, 30)))
    np.testing.assert_array_equal(np.roll(here, (-4, 3), axis=(0, 1)), there)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="at least 16, got 8"):
        render(single("ring"), 8)
    with pytest.raises(ValueError, match="'unknown' cannot be drawn"):
        render(single("unknown"))
    assert object_coverage(Scene("white", ())).shape == (0, 64, 64)
