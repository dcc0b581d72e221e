"""Scenes as data to evaluate on."""

from lavit_hf.data.scenes import Scene, facts_of, judge, make_scenes, parse_caption
from lavit_hf.evaluation.data.scenes import read_scenes


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


def test_more_scenes_begin_with_the_same():
    few, many = read_scenes("caption", None, 2), read_scenes("caption", None, 4)
    assert many.samples[:2] == few.samples
    assert few.digest() != many.digest() and few.digest() == read_scenes("caption", None, 2).digest()
