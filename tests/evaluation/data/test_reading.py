"""Formats are recognized by what is in a file; whatever does not fit is refused before anything is computed."""

import copy
import functools
import json
import operator

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
    import datasets

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
