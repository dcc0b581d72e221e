"""Scenes as datasets."""

import itertools
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from lavit_hf.data.scenes import (
    Scene,
    facts_of,
    make_scenes,
    parse_caption,
    render,
    sample_scene,
    scene_row,
    stream_scenes,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` puts lock files into its cache; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(dataset) -> list[str]:
    return [row["text"] for row in dataset]


def test_columns() -> None:
    scenes = make_scenes("validation", num_scenes=3, seed=4, image_size=32)
    assert scenes.column_names == ["image", "text", "questions", "scene"]
    for index, row in enumerate(scenes):
        scene = sample_scene("validation", 4, index)
        assert Scene.from_dict(row["scene"]) == scene
        assert parse_caption(row["text"]) == facts_of(scene)
        assert row["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(render(scene, 32)))
        assert {"question", "answer", "kind"} == set(row["questions"][0])
        assert row["questions"] == scene_row("validation", 4, index)["questions"]


def test_more_scenes_begin_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    few = make_scenes(num_scenes=3)

    monkeypatch.setattr("lavit_hf.data._ROWS_AT_A_TIME", 2)
    many = make_scenes(num_scenes=5)
    assert len(many) == 5 and many[:3] == few[:]
    assert many.features == few.features


def test_no_scenes() -> None:
    assert len(make_scenes(num_scenes=0)) == 0
    assert make_scenes(num_scenes=0).features == make_scenes(num_scenes=1).features
    assert texts(stream_scenes(num_scenes=0)) == []


def test_streams_are_the_same_and_endless() -> None:
    scenes = make_scenes("held_out", num_scenes=6, seed=1)
    assert list(stream_scenes("held_out", seed=1, num_scenes=6)) == list(scenes)
    stream = stream_scenes("held_out", seed=1)
    assert texts(itertools.islice(stream, 6)) == texts(scenes)
    assert stream.features == scenes.features


def test_a_stream_goes_on_where_it_stopped() -> None:
    stream = stream_scenes()
    iterator = iter(stream)
    for _ in range(3):
        next(iterator)
    resumed = stream_scenes()
    resumed.load_state_dict(stream.state_dict())
    assert next(iter(resumed))["text"] == scene_row("train", 0, 3)["text"]


def test_workers_share_an_endless_stream() -> None:
    stream = stream_scenes(num_shards=2).select_columns("text")
    loader = DataLoader(stream, batch_size=3, num_workers=2)
    found = [text for batch in itertools.islice(loader, 4) for text in batch["text"]]
    assert sorted(found) == sorted(scene_row("train", 0, index)["text"] for index in range(12))


def test_saved_and_loaded(tmp_path: Path) -> None:
    scenes = make_scenes(num_scenes=4)
    scenes.save_to_disk(tmp_path / "scenes")
    assert datasets.load_from_disk(tmp_path / "scenes")[:] == scenes[:]


def test_wrong_arguments_are_refused_at_once() -> None:
    for function in (make_scenes, stream_scenes):
        with pytest.raises(ValueError, match="'test' is no split"):
            function("test")
        with pytest.raises(ValueError, match="image_size must be at least 16"):
            function(image_size=8)
        with pytest.raises(ValueError, match="num_scenes must not be negative"):
            function(num_scenes=-1)
        with pytest.raises(ValueError, match="seed and index must not be negative"):
            function(seed=-1)
    with pytest.raises(ValueError, match="num_shards must be at least 1"):
        stream_scenes(num_shards=0)


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for function in (make_scenes, stream_scenes):
        with pytest.raises(ImportError, match="pip install 'lavit-hf\\[training\\]'"):
            function()
    assert scene_row("train", 0, 0)["text"]
