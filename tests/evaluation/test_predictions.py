"""Predictions on the disk are whole or not there, whatever happens; the page of samples shows them."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from lavit_hf.evaluation.predictions import PredictionDirectory, write_samples_page
from lavit_hf.evaluation.tasks import Shown, open_picture

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


@pytest.mark.parametrize("line", ["{", "[]", "5", "{}", '{"id": []}', "\0\0"])
def test_a_damaged_line_is_named(directory, line):
    with directory.writer(0) as writer:
        writer.write({"id": "a"})
    directory.merge(["a"])
    path = directory.path / "predictions.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        ValueError, match="predictions.jsonl is damaged in line 2: it is no prediction. Remove the file"
    ):
        directory.finished()
    path.unlink()
    assert directory.finished() == {}


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


def test_a_record_that_was_lost_is_made_again(directory):
    """Regression: what was made again was not seen beside the merged file, however often."""
    with directory.writer(0) as writer:
        writer.write({"id": "a"})
        writer.write({"id": "b"})
    directory.merge(["a", "b"])
    merged = directory.path / "predictions.jsonl"
    merged.write_bytes(merged.read_bytes()[:-3])  # as a copy may end
    assert list(directory.finished()) == ["a"]
    with directory.writer(0) as writer:
        writer.write({"id": "b"})
    assert directory.merge(["a", "b"]) == [{"id": "a"}, {"id": "b"}]


def test_other_settings_are_refused(directory):
    directory.open(SETTINGS)
    with pytest.raises(ValueError, match=r"\(size.height: None there, 2 now\)"):
        directory.open({**SETTINGS, "size": {"height": 2}})
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


RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (400, 200), (0, 0, 255))


def test_right_and_wrong_samples_are_on_the_page(tmp_path):
    shown = [
        Shown([("picture", RED)], [("caption", "a <b> & c")], is_right=True),
        Shown([("picture", BLUE)], [("caption", "long " * 30)], is_right=False),
        Shown([("picture", RED)]),
    ]
    write_samples_page(tmp_path, "3 of 4", shown)
    page = (tmp_path / "samples.html").read_text()
    assert re.findall('<section class="(.*?)">', page) == ["right", "wrong", ""]
    assert "a &lt;b&gt; &amp; c" in page and "<h1>3 of 4</h1>" in page
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall('base64,(.*?)"', page)]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert pictures[1].size == (192, 96)
    sheet = Image.open(tmp_path / "samples.png")
    colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 0, 255), (200, 30, 30), (30, 130, 60)} <= colors


def test_the_same_samples_make_the_same_files(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_samples_page(tmp_path / name, "title", [Shown([("one", RED), ("two", BLUE)], [("text", "")])] * 5)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_texts_of_data_stay_texts(tmp_path):
    evil = '<script>a\nb</script> " \ud800 \x00'
    write_samples_page(tmp_path, evil, [Shown([(evil, RED)], [(evil, evil)])])
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;a b&lt;/script&gt; &quot;") == 5
    assert Image.open(tmp_path / "samples.png").width > 0
