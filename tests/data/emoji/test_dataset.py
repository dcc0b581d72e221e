"""Scenes of emoji as datasets and as batches."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from lavit_hf.data.emoji import (
    Scene,
    emoji_row,
    facts_of,
    label_patches,
    make_emoji,
    parse_caption,
    render,
    sample_scene,
    stream_batches,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` puts lock files into its cache; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_columns() -> None:
    rows = make_emoji("unseen_artist", num_scenes=4, seed=4)
    assert rows.column_names == ["image", "text", "questions", "scene"]
    for index, row in enumerate(rows):
        scene = sample_scene("unseen_artist", 4, index)
        assert Scene.from_dict(row["scene"]) == scene
        assert parse_caption(row["text"]) == facts_of(scene)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(render(scene)))
        assert row["questions"] == emoji_row("unseen_artist", 4, index)["questions"]


def test_more_scenes_begin_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:

    few = make_emoji(num_scenes=3)
    monkeypatch.setattr("lavit_hf.data._ROWS_AT_A_TIME", 2)
    many = make_emoji(num_scenes=5)
    assert len(many) == 5 and many[:3]["text"] == few[:]["text"] and many.features == few.features
    assert make_emoji(num_scenes=0).features == few.features


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "test"}, "no split"),
        ({"seed": -1}, "must not be negative"),
        ({"num_scenes": -1}, "must not be negative"),
        ({"image_size": 31}, "image_size must be even"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_emoji(**wrong)
    with pytest.raises(ValueError, match=message):
        stream_batches(**{("start" if name == "num_scenes" else name): value for name, value in wrong.items()})
    with pytest.raises(ValueError, match="batch_size"):
        stream_batches(batch_size=0)


def test_batches_are_of_the_same_scenes() -> None:
    first, second = itertools.islice(stream_batches("train", 3, batch_size=5), 2)
    assert first.pixels.shape == (5, 3, 96, 96) and first.pixels.dtype == torch.uint8
    (both,) = itertools.islice(stream_batches("train", 3, batch_size=10), 1)
    assert torch.equal(both.pixels, torch.cat([first.pixels, second.pixels]))
    assert torch.equal(both.labels.concept, torch.cat([first.labels.concept, second.labels.concept]))
    (resumed,) = itertools.islice(stream_batches("train", 3, batch_size=5, start=5), 1)
    assert torch.equal(resumed.pixels, second.pixels)
    assert first.scenes.to_scenes()[2] == sample_scene("train", 3, 2)
    np.testing.assert_array_equal(
        first.pixels[2].permute(1, 2, 0).numpy(), np.asarray(render(sample_scene("train", 3, 2)))
    )


def test_varied_batches_look_otherwise_and_show_the_same() -> None:
    (plain,) = itertools.islice(stream_batches(batch_size=32), 1)
    (varied,) = itertools.islice(stream_batches(batch_size=32, varied=True), 1)
    assert plain.scenes.to_scenes() == varied.scenes.to_scenes()
    assert not torch.equal(plain.pixels, varied.pixels)
    assert torch.equal(label_patches(plain.scenes, 12).concept, plain.labels.concept)
