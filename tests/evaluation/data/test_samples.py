"""Scenes and rows of datasets as samples to evaluate on."""

import json

import datasets
import pytest

from lavit_hf.data.scenes import Scene, facts_of, judge, make_scenes, parse_caption
from lavit_hf.evaluation import read_data
from lavit_hf.evaluation.data.samples import Columns, EvaluationSample, TableSamples, read_scenes


def test_scenes_are_those_of_the_dataset():
    data = read_scenes("caption", None, 5)
    rows = make_scenes("validation", 5)
    assert (data.name, data.split, data.is_scenes, len(data.samples)) == ("scenes", "validation", True, 5)
    for index, (sample, row) in enumerate(zip(data.samples, rows, strict=True)):
        truth = facts_of(Scene.from_dict(sample.meta["scene"]))
        assert sample.id == f"{index:06d}" and sample.references == (row["text"],)
        assert truth == facts_of(judge(sample.open_image())) == parse_caption(sample.references[0])


def test_held_out_pairs():
    data = read_scenes("text-to-image", "held_out", 20)
    assert all(Scene.from_dict(sample.meta["scene"]).has_held_out_pair for sample in data.samples)


def test_every_question_of_a_scene_is_a_sample():
    data = read_scenes("vqa", "validation", 3)
    questions = [question for row in make_scenes("validation", 3) for question in row["questions"]]
    assert [(s.question, s.references, s.meta["kind"]) for s in data.samples] == [
        (question["question"], (question["answer"],), question["kind"]) for question in questions
    ]
    assert len({sample.id for sample in data.samples}) == len(data.samples) > 3
    assert data.samples[0].id == "000000-color"


def test_samples_of_the_same_image_know_it(tmp_path):
    questions = read_scenes("vqa", None, 2).samples
    scenes = {(sample.id.partition("-")[0], sample.image_key()) for sample in questions}
    assert len(scenes) == len({key for _, key in scenes}) == 2
    pictures = [tmp_path / "a.png", {"path": "a.png", "bytes": None}, "b.png", {"path": "a.png", "bytes": b"1"}, b"1"]
    keys = [EvaluationSample(str(number), picture).image_key() for number, picture in enumerate([*pictures, None, []])]
    assert len(set(keys)) == 6 and keys[3] == keys[4]


def test_more_scenes_begin_with_the_same():
    few, many = read_scenes("caption", None, 2), read_scenes("caption", None, 4)
    assert many.samples[:2] == few.samples
    assert few.digest() != many.digest() and few.digest() == read_scenes("caption", None, 2).digest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    rows = make_scenes(num_scenes=3).select_columns(["image", "text"])
    path = tmp_path / "saved"
    datasets.DatasetDict(test=rows.add_column("many", [["a", "b"], ["c"], ["d"]])).save_to_disk(path)
    return path


def test_one_text_or_several(saved):
    samples = TableSamples(str(saved), "caption", "test", Columns())
    assert len(samples) == 3
    assert [sample.id for sample in samples] == ["000000", "000001", "000002"]
    scenes = make_scenes(num_scenes=3)
    assert samples[1].references == (scenes[1]["text"],)
    assert samples[1].open_image().tobytes() == scenes[1]["image"].tobytes()
    several = TableSamples(str(saved), "text-to-image", "test", Columns(text="many"), num_samples=2)
    assert [sample.references for sample in several] == [("a", "b"), ("c",)]


def test_reconstruction_needs_no_text(saved):
    samples = TableSamples(str(saved), "reconstruction", "test", Columns(text="nowhere"))
    assert samples[0].references == () and samples[0].open_image().size == (64, 64)


def test_questions_and_paths(tmp_path, folder, add_image):
    add_image("0.png", "blue")
    row = {"image": "images/0.png", "asked": "What?", "right": ["a", "b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    columns = Columns(question="asked", answer="right")
    (sample,) = TableSamples(str(tmp_path / "rows.jsonl"), "vqa", "test", columns)
    assert (sample.question, sample.references) == ("What?", ("a", "b"))
    assert sample.open_image().getpixel((0, 0)) == (0, 0, 255)
    row["image"] = "0.png"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (elsewhere,) = TableSamples(str(tmp_path / "rows.jsonl"), "vqa", "test", columns, image_root=folder)
    assert elsewhere.open_image().getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("caption", {"text": None}, "got None"),
        ("caption", {"text": 5}, "got 5"),
        ("caption", {"text": []}, "there is no text"),
        ("text-to-image", {"text": ["a", None]}, "got None"),
        ("caption", {"text": "\ud83d"}, "lone surrogate"),
        ("vqa", {"question": None, "answer": "b"}, "got None"),
        ("vqa", {"question": 5, "answer": "b"}, "got 5"),
        ("vqa", {"question": "a", "answer": None}, "got None"),
        ("vqa", {"question": "a", "answer": [5]}, r"got 5"),
        ("vqa", {"question": "a", "answer": []}, "there is no text"),
    ],
)
def test_nulls_integers_and_half_characters(monkeypatch, task, values, message):
    """Arrow itself holds no half characters, but rows may be computed by a transform."""
    row = {"image": make_scenes(num_scenes=1)[0]["image"], **values}
    table = datasets.Dataset.from_dict({name: [0] for name in row})
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, index: row)
    monkeypatch.setattr("lavit_hf.evaluation.data.samples.load_data", lambda *args: (table, None))
    with pytest.raises(ValueError, match=f"the-data, row 0: .*{message}"):
        TableSamples("the-data", task, "test", Columns())[0]


def test_nulls_in_a_file(tmp_path, folder, add_image):
    add_image("0.png", "blue")
    rows = [{"image": image, "text": text} for image, text in ((None, "a"), ("0.png", None), ("data:,x", "a"))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = TableSamples(str(folder / "rows.jsonl"), "caption", "test", Columns())
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: expected a text, got None"):
        samples[1]
    for index, message in ((0, "Sample 000000: the image cannot"), (2, "Sample 000002: .*the data URI as an image")):
        with pytest.raises(ValueError, match=message):
            samples[index].open_image()


def test_missing_columns(saved):
    with pytest.raises(ValueError, match="has no column 'question'; it has 'image', 'text', 'many'"):
        TableSamples(str(saved), "vqa", "test", Columns())


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png"])
def test_images_elsewhere_are_not_read(tmp_path, folder, add_image, name):
    add_image("../secret.png")
    add_image("own.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"image": image, "text": "a"} for image in ("own.png", name.format(root=tmp_path), str(folder / "own.png"))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for options in ({}, {"image_root": folder}):
        samples = TableSamples(str(folder / "rows.jsonl"), "caption", "test", Columns(), **options)
        assert samples[0].open_image().size == samples[2].open_image().size
        with pytest.raises(ValueError, match="Sample 000001: .*(secret|link).png, which .* outside of"):
            samples[1].open_image()


def test_emoji_are_a_world_like_any():
    data = read_data("emoji", "caption", split="unseen_artist", num_samples=3)
    assert (data.name, data.split, data.is_scenes, len(data.samples)) == ("emoji", "unseen_artist", True, 3)
    for sample in data.samples:
        truth = data.world.facts_of(data.world.scene_from_dict(sample.meta["scene"]))
        assert truth == data.world.facts_of(data.world.judge(sample.open_image()))
        assert truth == data.world.parse_caption(sample.references[0])
    asked = read_data("emoji", "vqa", num_samples=3)
    assert asked.split == "validation" and {sample.meta["kind"] for sample in asked.samples} > {"what", "yes_no"}
    with pytest.raises(ValueError, match="no split"):
        read_data("emoji", "caption", split="test")
