"""Formats are recognized by what is in a file; whatever does not fit is refused before anything is computed."""

import contextlib
import copy
import functools
import json
import operator
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import datasets
import pytest

from evaluation.data.test_benchmarks import (
    GQA_CONTENT,
    coco_content,
    karpathy_image,
    vizwiz_asked,
    vqav2_answers,
    vqav2_content,
)
from lavit_hf.evaluation.data import read_data


@pytest.fixture
def write(tmp_path):
    def write_json(content, name: str = "file.json") -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write_json


def test_every_format_is_recognized(write, folder, add_image):
    for name in ("COCO_val2014_000000391895.jpg", "COCO_val2014_000000000042.jpg", "1.jpg", "000000262148.jpg"):
        add_image(name)
    for name in ("n161313.jpg", "n235859.jpg", "VizWiz_val_00000000.jpg"):
        add_image(name)
    karpathy = {"images": [karpathy_image(1, "test")]}
    answers = write(vqav2_answers(), "answers.json")
    for content, task, options, metric, split in (
        (coco_content(), "caption", {}, "cider", None),
        (karpathy, "text-to-image", {}, "cider", "test"),
        (vqav2_content(), "vqa", {"annotations": answers}, "vqa_accuracy", None),
        (GQA_CONTENT, "vqa", {}, "exact_match", None),
        ([vizwiz_asked(0, "basil")], "vqa", {}, "vqa_accuracy", None),
    ):
        data = read_data(write(content), task, images=folder, **options)
        assert data.split == split and not data.is_scenes
        assert metric == data.answer_metric if task == "vqa" else metric in data.caption_metrics
        data.samples[0].open_image()


def test_images_are_looked_for_beside_the_file(write, tmp_path, folder, add_image):
    add_image("../n161313.jpg")
    add_image("../n235859.jpg")
    assert len(read_data(write(GQA_CONTENT), "vqa").samples) == 2


def test_all_else_is_a_table(write, tmp_path, folder, add_image, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    add_image("0.png")
    data = read_data(write([{"image": "0.png", "text": "red"}]), "caption", images=folder)
    assert data.split == "test" and data.samples[0].references == ("red",)
    (tmp_path / "lines.json").write_text('{"image": "0.png", "text": "a"}\n{"image": "0.png", "text": "b"}\n')
    assert len(read_data(str(tmp_path / "lines.json"), "caption", images=folder).samples) == 2


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("caption", {}, "holds no captions"),
        ("vqa", {"split": "val"}, "leave --split out"),
        ("vqa", {"num_samples": 0}, "at least 1"),
        ("editing", {}, "for made scenes"),
    ],
)
def test_what_does_not_fit_is_refused(write, folder, add_image, task, options, message):
    add_image("n161313.jpg")
    add_image("n235859.jpg")
    with pytest.raises(ValueError, match=message):
        read_data(write(GQA_CONTENT), task, images=folder, **options)


def test_broken_files(write, folder, add_image):
    add_image("n161313.jpg")
    with pytest.raises(ValueError, match="--annotations takes"):
        read_data(write(vqav2_content()), "vqa", images=folder)
    with pytest.raises(ValueError, match="incomplete.*file_name"):
        read_data(write({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": ""}]}), "caption")
    asked = GQA_CONTENT["201307251"]
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        read_data(write({"../a": asked}), "vqa", images=folder)
    row = karpathy_image(1, "test")
    add_image("1.jpg")
    with pytest.raises(ValueError, match="two samples with the id 000000000001"):
        read_data(write({"images": [row, row]}), "caption", images=folder)
    with pytest.raises(ValueError, match="holds no questions, which the task vqa needs"):
        read_data(write({"images": [row]}), "vqa", images=folder)
    lines = folder / "answers.txt"
    lines.write_text("red\nblue\n")
    with pytest.raises(ValueError, match=r"--annotations takes a JSON file, which .*answers\.txt is not"):
        read_data(write(vqav2_content()), "vqa", images=folder, annotations=str(lines))


def _formats(write) -> dict:
    """Of every format: the content, how to get at a row of it, fields that are texts and integers, and the rest."""
    karpathy = {"images": [karpathy_image(1, "test"), karpathy_image(2, "test")]}
    vqav2 = {"annotations": write(vqav2_answers(), "answers.json")}
    return {
        "coco": (coco_content(), ("images", 1), ["file_name"], ["id"], "caption", {}),
        "captions": (coco_content(), ("annotations", 1), ["caption"], ["image_id"], "caption", {}),
        "karpathy": (karpathy, ("images", 1), ["filename", "split"], ["imgid"], "caption", {}),
        "sentences": (karpathy, ("images", 1, "sentences", 1), ["raw"], [], "caption", {}),
        "vqav2": (vqav2_content(), ("questions", 1), ["question"], ["question_id", "image_id"], "vqa", vqav2),
        "gqa": (GQA_CONTENT, ("201640614",), ["question", "answer", "imageId"], [], "vqa", {}),
        "vizwiz": ([vizwiz_asked(0, "a"), vizwiz_asked(1, "b")], (1,), ["question", "image"], [], "vqa", {}),
        "answers": ([vizwiz_asked(0, "a", "b")], (0, "answers", 1), ["answer"], [], "vqa", {}),
    }


@pytest.mark.parametrize("name", ["coco", "captions", "karpathy", "sentences", "vqav2", "gqa", "vizwiz", "answers"])
def test_nulls_integers_and_half_characters_are_named(write, folder, add_image, name):
    for image in ("COCO_val2014_000000391895.jpg", "COCO_val2014_000000000042.jpg", "1.jpg", "2.jpg", "n161313.jpg"):
        add_image(image)
    for image in ("n235859.jpg", "000000262148.jpg", "VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"):
        add_image(image)
    original, keys, texts, integers, task, options = _formats(write)[name]
    assert len(read_data(write(original), task, images=folder, **options).samples) > 0

    def refuse(change, message: str) -> None:
        content = copy.deepcopy(original)
        *path, last = keys
        parent = functools.reduce(operator.getitem, path, content)
        parent[last] = change(parent[last])
        with pytest.raises(ValueError, match=f"file.json: .*{message}"):
            read_data(write(content), task, images=folder, **options)

    refuse(lambda row: None, "None instead of an object")
    for field in [*texts, *integers]:
        kind = "a text" if field in texts else "an integer"
        wrong = [None, 5, ["a"]] if field in texts else [None, "5", 1.5, True]
        for value in wrong:
            refuse(lambda row: {**row, field: value}, f"{field} is .*, expected {kind}")  # noqa: B023
    for field in texts:
        refuse(lambda row: {**row, field: "a\ud83d"}, f"{field}: A text holds the lone surrogate")  # noqa: B023


def test_data_uris_are_no_files(write, folder):
    uri = "data:image/png;base64," + "A" * 5000
    content = {"images": [{"id": 3, "file_name": uri}], "annotations": [{"image_id": 3, "caption": "a"}]}
    with pytest.raises(ValueError, match="file.json: Image 3: .* has no data:image/png;base64,AAA") as caught:
        read_data(write(content), "caption", images=folder)
    assert len(str(caught.value)) < 500


def test_a_corrupt_image_is_named(write, folder, add_image):
    add_image("n161313.jpg")
    add_image("n235859.jpg")
    (folder / "n235859.jpg").write_bytes(b"no image")
    data = read_data(write(GQA_CONTENT), "vqa", images=folder)
    with pytest.raises(ValueError, match="Sample 201640614: the image cannot be read"):
        data.samples[1].open_image()


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png"])
def test_images_elsewhere_are_not_read(write, tmp_path, folder, add_image, name):
    add_image("../secret.png")
    for ending in ("png", "jpg"):
        (folder / f"link.{ending}").symlink_to(tmp_path / "secret.png")
    name = name.format(root=tmp_path)
    coco = {"images": [{"id": 3, "file_name": name}], "annotations": [{"image_id": 3, "caption": "a"}]}
    karpathy = {"images": [{**karpathy_image(1, "test"), "filename": name}]}
    vizwiz = [{"image": name, "question": "What?", "answers": [{"answer": "a"}]}]
    gqa = {"0": {"imageId": name.removesuffix(".png"), "question": "What?", "answer": "a"}}
    for content, task, row in (
        (coco, "caption", "Image 3"),
        (karpathy, "caption", "Image 1"),
        (vizwiz, "vqa", "Question 0"),
        (gqa, "vqa", "Question 0"),
    ):
        with pytest.raises(ValueError, match=f"{row} (names|has) .*(secret|link).*outside") as caught:
            read_data(write(content), task, images=folder)
        assert name.removesuffix(".png") in str(caught.value)


def test_the_subtype_of_questions_is_no_way_out(write, tmp_path, folder, add_image):
    asked = {"question_id": 1, "image_id": 2, "question": "What?"}
    add_image("../secret000000000002.jpg")
    (folder / "COCO_").mkdir()
    questions = write({"data_subtype": "/../../secret", "questions": [asked]}, "questions.json")
    answers = write({"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]}, "answers.json")
    with pytest.raises(ValueError, match="Question 1 names COCO_/../../secret_000000000002.jpg, which is outside"):
        read_data(questions, "vqa", images=folder, annotations=answers)


@pytest.mark.parametrize(
    "content",
    [
        {"images": {"first": {}}},
        {"images": [1]},
        {"questions": [None]},
        {"q": {**next(iter(GQA_CONTENT.values())), "types": "verify"}},
    ],
)
def test_files_of_another_shape_than_their_keys_promise(write, folder, add_image, content):
    if "q" in content:
        add_image(f"{content['q']['imageId']}.jpg")
    with pytest.raises(ValueError, match="looks like the file of a benchmark, but is incomplete"):
        read_data(write(content), "vqa", images=folder)


def test_captions_of_other_images_are_no_samples(write, folder):
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "A dog."}]}
    with pytest.raises(ValueError, match="holds no samples"):
        read_data(write(content), "caption", images=folder)


# Datasets that cannot be read


@pytest.fixture
def root(monkeypatch):
    """A directory that somebody else can be given."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache"))
        yield Path(folder)


def save(path: Path) -> Path:
    """Writes 50 rows in the format that the name says, to a directory without a suffix; returns the file of rows."""
    rows = datasets.Dataset.from_list([{"image": "a.png", "text": "red"}] * 50)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for index in range(50):
                archive.addfile(tarfile.TarInfo(f"{index}.txt"))
    elif path.suffix in (".parquet", ".jsonl", ".csv"):
        {".parquet": rows.to_parquet, ".jsonl": rows.to_json, ".csv": rows.to_csv}[path.suffix](path)
    else:
        rows.save_to_disk(path if not path.suffix else path.parent / "saved")
        file = next((path if not path.suffix else path.parent / "saved").glob("*.arrow"))
        return file if not path.suffix else Path(shutil.copy(file, path))
    return path


def read(path: Path):
    return read_data(str(path), "caption", split="train").samples


def half(content: bytes) -> bytes:
    return content[: len(content) // 2 - 7]  # not between two lines


def flipped(content: bytes) -> bytes:
    start = len(content) // 3
    return content[:start] + bytes(byte ^ 0xFF for byte in content[start : start + 40]) + content[start + 40 :]


def garbage(content: bytes) -> bytes:
    return b"\x00\xffgarbage" * 20


@pytest.mark.parametrize("damage", [half, flipped, garbage])
@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl", "rows.json", "saved"])
def test_a_damaged_dataset_is_named(root, name, damage):
    file = save(root / name)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{root / name} cannot be read: ")):
        read(root / name)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tar"])
def test_what_has_another_format_is_named(root, name):
    (root / name).write_bytes(garbage(b""))
    with pytest.raises(ValueError, match=re.escape(f"{root / name} cannot be read: ")):
        read(root / name)


def test_a_saved_dataset_that_lacks_a_setting_is_named(root):
    state = save(root / "saved").parent / "state.json"
    content = json.loads(state.read_text())
    del content["_output_all_columns"]
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{root / 'saved'} is damaged: KeyError('_output_all_columns')")):
        read(root / "saved")


def test_no_file_of_a_directory_is_left_out(root):
    save(root / "in" / "train-1.parquet")
    second = save(root / "in" / "more" / "train-2.parquet")
    assert len(read(root / "in")) == 100
    second.write_bytes(half(second.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{root / 'in'} cannot be read: ")):
        read(root / "in")
    second.unlink()
    second.symlink_to(root / "gone.parquet")
    with pytest.raises(FileNotFoundError, match=r"train-2\.parquet"):
        read(root / "in")
    second.rename(root / "in" / ".hidden.parquet")
    assert len(read(root / "in")) == 50


@contextlib.contextmanager
def forbidden(path: Path, root: Path):
    """Nobody may read a path; a superuser, whom nothing stops, is somebody else meanwhile."""
    user, mode = os.geteuid(), path.stat().st_mode
    path.chmod(0)
    if user == 0:
        for found in (root, *root.rglob("*")):
            os.chown(found, 65534, -1, follow_symlinks=False)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.mark.parametrize(
    ("name", "locked"),
    [
        ("rows.parquet", "rows.parquet"),
        ("rows.arrow", "rows.arrow"),
        ("rows.jsonl", "rows.jsonl"),
        ("rows.json", "rows.json"),
        ("rows.csv", "rows.csv"),
        ("rows.tar", "rows.tar"),
        ("in/rows.json", "in"),
        ("saved", "saved"),
        ("saved", "saved/state.json"),
        ("saved", "saved/data-00000-of-00001.arrow"),
    ],
)
def test_what_must_not_be_read_says_so(root, name, locked):
    save(root / "before" / Path(name).name)
    with contextlib.suppress(ValueError):  # imports what it takes, which not everybody may
        read(root / "before" / Path(name).name)
    save(root / name)
    with forbidden(root / locked, root), pytest.raises((OSError, ValueError), match="Permission denied") as caught:
        read(root / name)
    assert str(root / locked) in str(caught.value)


@pytest.mark.parametrize("locked", ["in", "in/more", "in/more/train-2.parquet"])
def test_what_must_not_be_read_is_not_left_out(root, locked):
    for place in (root / "before", root / "in"):
        save(place / "train-1.parquet")
        save(place / "more" / "train-2.parquet")
    assert len(read(root / "before")) == 100
    with forbidden(root / locked, root), pytest.raises(PermissionError, match=locked):
        read(root / "in")
    assert len(read(root / "in")) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "large"}, "scenes, whose scenes are made, has no use for config: leave it out ('large')"),
        ({"revision": "v2"}, "has no use for revision"),
        ({"columns": ("picture", "text", "question", "answer")}, "has no use for columns"),
        ({"images": "photos"}, "has no use for images"),
        ({"annotations": "answers.json"}, "has no use for annotations"),
    ],
)
def test_worlds_refuse_what_they_would_ignore(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_data("scenes", "caption", num_samples=1, **options)


def test_files_and_datasets_refuse_what_they_would_ignore(write, folder, add_image, tmp_path):
    for name in ("n161313.jpg", "n235859.jpg"):
        add_image(name)
    with pytest.raises(ValueError, match="the file of a benchmark, has no use for config"):
        read_data(write(GQA_CONTENT), "vqa", images=folder, config="large")
    with pytest.raises(ValueError, match="a dataset, has no use for annotations"):
        read_data(str(tmp_path), "vqa", annotations=write(vqav2_answers(), "answers.json"))
