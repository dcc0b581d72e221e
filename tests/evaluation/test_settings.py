"""The settings of `lavit evaluate`, and the tasks they stand for."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lavit_hf.evaluation import TASKS, EvaluationSettings, build_tasks


def test_every_task_of_every_split_once() -> None:
    settings = EvaluationSettings("scenes", splits=["held_out", "validation", "held_out"], num_samples=3)
    found = [(task.name, task.data.split) for task in build_tasks(settings)]
    assert found == [(name, split) for name in TASKS for split in ("held_out", "validation")]
    (task,) = build_tasks(EvaluationSettings("scenes", tasks=["caption", "caption"], num_samples=3))
    assert task.data.split == "validation"


def test_tasks_that_draw_have_a_number_of_samples_of_their_own() -> None:
    for num_drawings, expected in ((2, [3, 2]), (None, [3, 3])):
        settings = EvaluationSettings("scenes", ["caption", "text-to-image"], num_samples=3, num_drawings=num_drawings)
        assert [len(task.data.samples) for task in build_tasks(settings)] == expected


def test_each_task_takes_the_options_that_it_has() -> None:
    options = {"num_beams": 3, "num_inference_steps": 7, "top_k": None}
    settings = EvaluationSettings("scenes", ["vqa", "text-to-image"], num_samples=1, seed=5, options=options)
    vqa, drawing = build_tasks(settings)
    assert vqa.options["num_beams"] == 3 and "num_inference_steps" not in vqa.options
    assert drawing.options["num_inference_steps"] == 7 and drawing.options["top_k"] == 50
    assert vqa.seed == drawing.seed == 5


def test_data_are_read_as_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "0.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"file": "0.png", "says": "red", "text": "blue"}) + "\n")
    settings = EvaluationSettings(
        str(tmp_path / "data.jsonl"),
        ["caption"],
        images=tmp_path / "images",
        columns=("file", "says", "question", "answer"),
    )
    (task,) = build_tasks(settings)
    assert task.data.samples[0].references == ("red",)
    assert task.data.samples[0].open_image().getpixel((0, 0)) == (255, 0, 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no task 'ask'; there are caption, vqa, text-to-image, reconstruction"):
        build_tasks(EvaluationSettings("scenes", ["ask"]))
    with pytest.raises(ValueError, match="None of the tasks has a use for top_k=0"):
        build_tasks(EvaluationSettings("scenes", ["caption"], num_samples=1, options={"top_k": 0}))
