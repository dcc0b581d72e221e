"""`lavit tokenize`: datasets in all the forms that users have, and what is said about them."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from lavit_hf.data.loading import load_data
from lavit_hf.data.scenes import make_scenes

SCENES = make_scenes(num_scenes=4).select_columns(["image", "text"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` stores what it reads; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The scenes as PNG files, with a table beside them."""
    path = tmp_path / "pictures"
    path.mkdir()
    lines = []
    for index, scene in enumerate(SCENES):
        scene["image"].save(path / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": scene["text"]})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def expected(lavit, checkpoint: Path, path: Path) -> datasets.Dataset:
    SCENES.save_to_disk(path / "reference")
    assert lavit("tokenize", path / "reference", path / "reference-codes", "-m", checkpoint).exit_code == 0
    return datasets.load_from_disk(str(path / "reference-codes"))


def test_all_kinds_of_datasets(lavit, random_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    wanted = expected(lavit, random_checkpoint, tmp_path)
    assert wanted["text"] == SCENES["text"]
    datasets.DatasetDict(test=SCENES).save_to_disk(tmp_path / "splits")
    SCENES.to_parquet(tmp_path / "scenes.parquet")
    rows = [{"image": f"{index}.png", "text": text} for index, text in enumerate(SCENES["text"])]
    datasets.Dataset.from_list(rows).to_csv(folder / "table.csv")
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(folder, tmp_path / "imagefolder", ignore=shutil.ignore_patterns("table*"))
    for number, (name, options) in enumerate(
        [
            (tmp_path / "splits", ["--split", "test"]),
            (tmp_path / "reference", ["--streaming"]),
            (tmp_path / "scenes.parquet", ["--streaming", "--shard-size", 3]),
            (folder / "table.csv", []),
            (folder / "table.jsonl", ["--batch-size", 1]),
            (tmp_path / "imagefolder", []),
        ]
    ):
        result = lavit("tokenize", name, tmp_path / f"{number}", "--model", random_checkpoint, *options)
        assert result.exit_code == 0, (name, result.output)
        assert result.stdout.startswith(f"Wrote {tmp_path / str(number)}: 4 rows, 4 images, ")
        assert datasets.load_from_disk(str(tmp_path / f"{number}"))[:] == wanted[:], name


def test_options(lavit, random_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    command = ["tokenize", folder, tmp_path / "out", "--model", random_checkpoint, "--format", "webdataset"]
    result = lavit(*command, "--no-text", "--keep-column", "text", "--threads", 1, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    stream = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert set(stream[0]["json"]) == {"codes", "text", "length", "sample_id"}
    metadata = json.loads((tmp_path / "out" / "tokenization.json").read_text())
    assert metadata["checkpoint"] == str(random_checkpoint) and metadata["dataset"] == str(folder)
    few = lavit("tokenize", folder, tmp_path / "few", "--model", random_checkpoint, "--num-tokens", 3)
    assert few.stdout.endswith("3.0 codes per image\n")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"with `{random_checkpoint.name}`;" in card and str(random_checkpoint.parent) not in card


def test_bad_samples_are_listed(lavit, random_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:100])
    command = ["tokenize", folder, tmp_path / "out", "--model", random_checkpoint]
    result = lavit(*command)
    assert result.exit_code == 0, result.output
    assert "3 rows" in result.stdout
    assert "1 of 4 samples are bad and left out:\n  2: " in result.stderr
    stopped = lavit("tokenize", folder, tmp_path / "b", "--model", random_checkpoint, "--on-bad-sample", "raise")
    assert stopped.exit_code == 1 and "lavit: error: Sample 2 of the dataset is bad" in stopped.stderr


def test_clear_errors(lavit, random_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def error(dataset, *options, out="out") -> str:
        result = lavit("tokenize", dataset, tmp_path / out, "--model", random_checkpoint, *options)
        assert result.exit_code == 1, result.output
        return result.stderr.splitlines()[-1]

    assert "nowhere.jsonl does not exist" in error(tmp_path / "nowhere.jsonl")
    assert "./nowhere does not exist" in error("./nowhere")
    assert "cannot read a dataset from this file" in error(folder / "0.png")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl is empty" in error(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"image": ')
    assert "broken.jsonl cannot be read: " in error(tmp_path / "broken.jsonl")
    for options in ([], ["--streaming"]):
        message = error(folder, "--split", "test", *options)
        assert f"{folder} has no split 'test'; it has train. Name one that there is, as in --split train." in message
    assert "no column 'caption'" in error(folder, "--text-column", "caption")
    datasets.DatasetDict(test=SCENES).save_to_disk(tmp_path / "splits")
    assert "has no split 'train'; it has test" in error(tmp_path / "splits")
    assert "holds no tokenized data" in error(folder, out="pictures")
    wrong_model = lavit("tokenize", folder, tmp_path / "out", "--model", tmp_path)
    assert "config.json" in wrong_model.stderr


def test_names_on_the_hub_are_left_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)))
    load_data("user/name", "test", "small", "v1", streaming=True)
    load_data("name")
    assert calls == [
        (("user/name", "small"), {"split": "test", "revision": "v1", "streaming": True}),
        (("name", None), {"split": "train", "revision": None, "streaming": False}),
    ]
