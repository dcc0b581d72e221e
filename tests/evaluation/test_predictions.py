"""Predictions on the disk: whole or not there, whatever happens."""

import json

import pytest
from PIL import Image

from lavit_hf.evaluation.predictions import PredictionDirectory
from lavit_hf.evaluation.tasks.drawing import open_picture

SETTINGS = {"seed": 0, "options": {"sizes": (1, 2)}}


@pytest.fixture
def directory(tmp_path):
    created = PredictionDirectory(tmp_path / "out")
    created.open(SETTINGS)
    return created


def test_records_of_several_processes_are_merged_in_order(directory):
    with directory.writer(1) as writer:
        writer.write({"id": "b", "prediction": "\u2028 ü"})
    with directory.writer(0) as writer:
        writer.write({"id": "c"}, Image.new("RGB", (4, 4), "red"))
        writer.write({"id": "a"})
    records = directory.merge(["a", "b", "c"])
    assert records == [
        {"id": "a"},
        {"id": "b", "prediction": "\u2028 ü"},
        {"id": "c", "picture": "pictures/c.png"},
    ]
    assert Image.open(directory.path / "pictures" / "c.png").getpixel((0, 0)) == (255, 0, 0)
    lines = (directory.path / "predictions.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == records
    assert sorted(path.name for path in directory.path.iterdir()) == ["pictures", "predictions.jsonl", "settings.json"]
    assert directory.merge(["a", "b", "c"]) == records  # again, as a later call does


def test_a_torn_line_is_written_again(directory):
    with directory.writer(0) as writer:
        writer.write({"id": "a", "prediction": "one"})
    shard = directory.path / "shards" / "00000.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b'{"id": "b", "predic')
    assert list(directory.finished()) == ["a"]
    with directory.writer(0) as writer:
        writer.write({"id": "b"})
    assert shard.read_bytes() == whole + b'{"id": "b"}\n'


def test_pictures_that_were_torn_are_removed(directory):
    with directory.writer(0) as writer:
        writer.write({"id": "a"}, Image.new("RGB", (4, 4)))
    (directory.path / "pictures" / ".b.png.123.partial").write_bytes(b"half")
    directory.merge(["a"])
    assert [path.name for path in (directory.path / "pictures").iterdir()] == ["a.png"]


def test_missing_predictions(directory):
    with directory.writer(0) as writer:
        writer.write({"id": "a"})
    with pytest.raises(RuntimeError, match="1 predictions are missing in .*, the first is b"):
        directory.merge(["a", "b"])
    assert not (directory.path / "predictions.jsonl").exists()


def test_other_settings_are_refused(directory):
    directory.open(SETTINGS)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        directory.open({**SETTINGS, "seed": 1})


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no predictions"):
        PredictionDirectory(tmp_path).open(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_pictures_elsewhere_are_not_shown(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "out").mkdir()
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ValueError, match="The prediction of a names .*secret.png, which is outside"):
            open_picture({"id": "a", "picture": name}, tmp_path / "out")
