"""Datasets on the disk do not reach out of their directory."""

import io
import json
import tarfile
from contextlib import suppress

import datasets
import pytest

from lavit_hf.data.loading import load_data

ROWS = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a"]})


def change(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_saved_dataset(tmp_path):
    ROWS.save_to_disk(tmp_path / "saved")
    dataset, root = load_data(str(tmp_path / "saved"))
    assert dataset[0] == ROWS[0] and root == tmp_path / "saved"


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_pattern(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("b/1.parquet", "a/2.parquet", "a/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / name)
    dataset, root = load_data(str(tmp_path / "*" / "*.parquet"), streaming=streaming)
    assert [row["text"] for row in dataset] == ["a/2.parquet", "b/1.parquet"] and root == tmp_path
    with pytest.raises(ValueError, match=r"No file is named like .*none\*\.parquet"):
        load_data(str(tmp_path / "none*.parquet"))


def test_a_dataset_on_the_disk_is_streamed_in_shards(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.save_to_disk(tmp_path / "saved")
    for num_shards, expected in ((1, 1), (2, 2), (9, 3)):
        stream, _ = load_data(str(tmp_path / "saved"), streaming=True, num_shards=num_shards)
        assert stream.num_shards == expected and [row["text"] for row in stream] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name", ["../other/data-00000-of-00001.arrow", "{root}/other/data-00000-of-00001.arrow", "link"]
)
def test_files_of_other_datasets_are_not_loaded(tmp_path, name):
    for folder in ("saved", "other"):
        ROWS.save_to_disk(tmp_path / folder)
    (tmp_path / "saved" / "link").symlink_to("../other/data-00000-of-00001.arrow")
    change(tmp_path / "saved" / "state.json", _data_files=[{"filename": name.format(root=tmp_path)}])
    with pytest.raises(ValueError, match="state.json .*(other|link).* outside of"):
        load_data(str(tmp_path / "saved"))


def test_splits_of_other_datasets_are_not_loaded(tmp_path):
    ROWS.save_to_disk(tmp_path / "other")
    datasets.DatasetDict(train=ROWS).save_to_disk(tmp_path / "saved")
    assert load_data(str(tmp_path / "saved")).dataset[0] == ROWS[0]
    change(tmp_path / "saved" / "dataset_dict.json", splits=["../other"])
    with pytest.raises(ValueError, match="dataset_dict.json names ../other, which is outside of"):
        load_data(str(tmp_path / "saved"), "../other")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"_data_files": [5]}'])
def test_damaged_datasets_are_named(tmp_path, content):
    ROWS.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json"):
        load_data(str(tmp_path / "saved"))


def test_members_of_archives_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "rows.tar", "w") as archive:
        for name in ("../../victim.txt", str(tmp_path / "victim.txt"), "own.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with suppress(ValueError):  # it may refuse such an archive
        list(load_data(str(tmp_path / "in" / "rows.tar")).dataset)
    assert not list(tmp_path.rglob("victim.txt"))
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "cache"}


@pytest.mark.parametrize("name", ["scenes", "emoji"])
def test_worlds_are_made(name, tmp_path, monkeypatch):
    rows, root = load_data(name, "validation", num_scenes=3)
    assert root is None and len(rows) == 3 and rows[0]["image"].mode == "RGB"
    streamed = load_data(name, "validation", streaming=True, num_scenes=3).dataset
    assert [row["text"] for row in streamed] == rows["text"][:]
    with pytest.raises(ValueError, match="no split"):
        load_data(name, "nothing")
