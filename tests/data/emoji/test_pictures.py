"""Pictures of scenes of emoji, one by one and many at a time, and labels of their patches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lavit_hf.data.emoji import (
    BACKGROUNDS,
    SPLITS,
    Scene,
    SceneArrays,
    SceneObject,
    draw_looks,
    label_patches,
    load_pack,
    object_area,
    render,
    render_scenes,
    sample_scene,
    sample_scenes,
)
from lavit_hf.data.emoji.pictures import NO_SIZE

MEDIUM = SceneObject("apple", "noto", "medium", "top left", side=40, x=96, y=96)
BIG = SceneObject("apple", "noto", "big", "middle", side=80, x=192, y=192)


@pytest.mark.parametrize("split", SPLITS)
def test_many_at_a_time_are_the_same_as_one_by_one(split: str) -> None:
    scenes = sample_scenes(split, 0, np.arange(12))
    many = render_scenes(scenes).permute(0, 2, 3, 1).numpy()
    for pixels, scene in zip(many, scenes.to_scenes(), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(render(scene)))


def test_plain_backgrounds() -> None:
    for name, color in BACKGROUNDS.items():
        pixels = np.asarray(render(Scene(name, (MEDIUM,))))
        assert (pixels[48:] == color).all() and not (pixels[:48, :48] == color).all()


def test_gradients_become_darker_in_their_direction() -> None:
    right, down = (np.asarray(render(Scene("green", (MEDIUM,), angle))).astype(int) for angle in (0, 90))
    assert (right[80, 0] > right[80, -1] + 20).all() and (right[60, 3] == right[95, 3]).all()
    assert (down[50, 90] > down[95, 90] + 10).all() and (down[70, 0] == down[70, 95]).all()


def test_an_object_lies_where_the_scene_says() -> None:
    def extent(item: SceneObject) -> list[float]:
        difference = np.abs(np.asarray(render(Scene("blue", (item,)))).astype(int) - BACKGROUNDS["blue"]).max(axis=2)
        rows, columns = (np.flatnonzero((difference > 40).any(axis=axis)) for axis in (1, 0))
        return [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1]

    left, right, top, bottom = extent(MEDIUM)
    assert (left + right) / 2 == pytest.approx(24, abs=1) and (top + bottom) / 2 == pytest.approx(24, abs=1)
    assert max(right - left, bottom - top) == pytest.approx(40, abs=1.5)
    moved = extent(replace(MEDIUM, place="bottom right", x=96 + 192 + 4, y=96 + 192 - 4))
    assert moved == pytest.approx([left + 49, right + 49, top + 47, bottom + 47], abs=1)
    left, right, top, bottom = extent(BIG)
    assert max(right - left, bottom - top) == pytest.approx(80, abs=1.5)


def test_flipped_and_turned() -> None:
    item = SceneObject("key", "noto", "medium", "top left", side=40, x=96, y=96)
    plain, flipped = (
        np.asarray(render(Scene("blue", (replace(item, is_flipped=flip),))))[:48, :48] for flip in (False, True)
    )
    assert np.abs(plain[:, ::-1].astype(int) - flipped).max() <= 2
    turned = np.asarray(render(Scene("blue", (replace(item, angle=90),))))[:48, :48]
    assert np.abs(np.rot90(plain, -1).astype(int) - turned).max() <= 2


def test_other_sizes() -> None:
    scene = sample_scene("validation", 0, 3)
    large = render(scene, 192)
    assert large.size == (192, 192)
    small = np.asarray(large.resize((96, 96), 4)).astype(float)
    assert np.abs(small - np.asarray(render(scene))).mean() < 6
    with pytest.raises(ValueError, match="image_size must be even"):
        render(scene, 97)
    with pytest.raises(ValueError, match="at least 32"):
        render(scene, 16)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        render(Scene("unknown", (MEDIUM,)))
    with pytest.raises(ValueError, match="cannot be drawn"):
        render(Scene("white", (replace(MEDIUM, concept="unknown"),)))


def test_labels_are_where_objects_are() -> None:
    scenes = SceneArrays.from_scenes([Scene("pink", (MEDIUM,)), Scene("white", (BIG,))])
    labels = label_patches(scenes, 12)
    apple, nothing = load_pack().concepts.index("apple"), len(load_pack().concepts)
    one, big = labels.concept.view(2, 12, 12)
    assert set(one[:6, :6].flatten().tolist()) == {apple, nothing} and (one[1:5, 1:5] == apple).all()
    assert (one[6:] == nothing).all() and (one[:, 6:] == nothing).all()
    assert (big[3:9, 3:9] == apple).all()
    assert torch.equal(labels.is_object, labels.concept == apple)
    assert torch.equal(labels.size != NO_SIZE, labels.is_object)
    assert labels.background[:, 0].tolist() == [list(BACKGROUNDS).index(name) for name in ("pink", "white")]
    offset = labels.offset.view(2, 12, 12, 2)
    assert offset[0, 2, 4].tolist() == pytest.approx([0.25 - 4.5 / 12, 0.25 - 2.5 / 12], abs=1e-6)
    assert not offset[0, 8:].any()


def test_labels_agree_with_pixels() -> None:
    scenes = sample_scenes("validation", 0, np.arange(40))
    plain = SceneArrays(**{**vars(scenes), "gradient": np.full(40, -1), "screenshot": np.zeros(40, dtype=np.int64)})
    pixels = render_scenes(plain).int()
    base = torch.tensor(list(BACKGROUNDS.values()))[torch.from_numpy(scenes.background)]
    changed = ((pixels - base[:, :, None, None]).abs().amax(dim=1) > 20).float()
    share = torch.nn.functional.avg_pool2d(changed, 8).flatten(1)
    is_object = label_patches(scenes, 12).is_object
    assert (is_object == (share > 0.15)).float().mean() > 0.95
    assert object_area(scenes) == pytest.approx(changed.mean(dim=(1, 2)).numpy(), abs=0.06)


def test_looks_vary_colors_and_leave_what_is_there() -> None:
    indices = np.arange(64)
    scenes, looks = sample_scenes("train", 0, indices), draw_looks("train", 0, indices)
    plain, varied = render_scenes(scenes), render_scenes(scenes, looks=looks)
    assert (plain != varied).flatten(1).any(dim=1).float().mean() > 0.7
    labels, plain_labels = label_patches(scenes, 12, looks=looks), label_patches(scenes, 12)
    assert (labels.concept == plain_labels.concept).float().mean() > 0.95
    repainted = labels.background[:, 0] == -100
    assert torch.equal(repainted, torch.from_numpy(looks.is_repainted)) and 10 < repainted.sum() < 45
    some = draw_looks("train", 0, indices[10:20])
    assert all(np.array_equal(mine, its[10:20]) for mine, its in zip(some, looks, strict=True))
