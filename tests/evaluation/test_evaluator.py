"""Settings become tasks, tasks become `metrics.json`, and that becomes text; interruptions change nothing."""

import copy
import json
import operator
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from evaluation import tiny_evaluation
from evaluation.tiny_evaluation import BATCH_SIZE, NUM_SAMPLES
from lavit_hf.evaluation import (
    TASKS,
    EvaluatedCheckpoint,
    EvaluationData,
    EvaluationSample,
    EvaluationSettings,
    build_tasks,
    evaluate,
    read_data,
)
from lavit_hf.evaluation.evaluator import _predict, _with_images, format_metrics
from lavit_hf.evaluation.measurement import Measurement
from lavit_hf.evaluation.predictions import PredictionDirectory
from lavit_hf.evaluation.tasks import Prediction, VqaTask


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


def save_captions(folder: Path) -> str:
    Image.new("RGB", (8, 8), "red").save(folder / "0.jpg")
    content = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "Red."}]}
    (folder / "captions.json").write_text(json.dumps(content))
    return str(folder / "captions.json")


def test_without_names_tasks_that_the_data_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """Regression: all tasks had captions and questions among them, and no file of a benchmark has both."""
    captions = EvaluationSettings(save_captions(tmp_path), options={"num_candidates": 1})
    expected = ["caption", "text-to-image", "reconstruction"]
    assert [task.name for task in build_tasks(captions)] == expected
    assert [task.name for task in build_tasks(replace(captions, tasks=captions.tasks[:2], options={}))] == ["caption"]
    asked = {"imageId": "0", "question": "What color is it?", "answer": "red"}
    (tmp_path / "questions.json").write_text(json.dumps({"0": asked}))
    questions = EvaluationSettings(str(tmp_path / "questions.json"))
    assert [task.name for task in build_tasks(questions)] == ["vqa", "reconstruction"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.jpg", "text": "red"}) + "\n")
    rows = EvaluationSettings(str(tmp_path / "rows.jsonl"))
    assert [task.name for task in build_tasks(rows)] == expected


def test_data_that_fit_no_task_or_not_the_one_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no questions, which the task vqa needs"):
        build_tasks(EvaluationSettings(save_captions(tmp_path), ["caption", "vqa"]))
    (tmp_path / "rows.jsonl").write_text('{"picture": "0.jpg"}\n')
    with pytest.raises(ValueError, match=r"fits none of the tasks:\n.*has no column 'image'") as caught:
        build_tasks(EvaluationSettings(str(tmp_path / "rows.jsonl")))
    assert str(caught.value).count("no column") == 1
    with pytest.raises(ValueError, match="does not exist"):
        build_tasks(EvaluationSettings(str(tmp_path / "nowhere.json")))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no task 'ask'; there are caption, vqa, text-to-image, reconstruction"):
        build_tasks(EvaluationSettings("scenes", ["ask"]))
    with pytest.raises(ValueError, match="None of the tasks has a use for top_k=0"):
        build_tasks(EvaluationSettings("scenes", ["caption"], num_samples=1, options={"top_k": 0}))


BATCHES = -(-NUM_SAMPLES // BATCH_SIZE)


def run_script(python: str, checkpoint: Path, output: Path, num_batches: int = 0, launcher: tuple[str, ...] = ()):
    command = [python, *launcher, tiny_evaluation.__file__, str(checkpoint), str(output), str(num_batches)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(evaluated, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("uninterrupted")
    tiny_evaluation.run(evaluated, output)
    return contents(output)


def test_killed_and_resumed(python, evaluated, random_checkpoint, tmp_path, uninterrupted):
    result = run_script(python, random_checkpoint, tmp_path, num_batches=BATCHES + 2)  # in the second task
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    shard = tmp_path / "reconstruction" / "held_out" / "shards" / "00000.jsonl"
    assert shard.read_bytes().count(b"\n") == 2 * BATCH_SIZE and shard.read_bytes().endswith(b'{"id": "00000')
    assert not (tmp_path / "metrics.json").exists()
    tiny_evaluation.run(evaluated, tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_two_processes_give_the_same_as_one(python, random_checkpoint, tmp_path, uninterrupted):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = run_script(python, random_checkpoint, tmp_path, launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path) == uninterrupted


def test_what_is_written(uninterrupted):
    assert {name.rpartition("/")[2] for name in uninterrupted if "pictures" not in name} == {
        "metrics.json",
        "predictions.jsonl",
        "samples.html",
        "samples.png",
        "settings.json",
    }
    lines = uninterrupted["caption/held_out/predictions.jsonl"].decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{index:06d}" for index in range(NUM_SAMPLES)]
    assert sum(name.startswith("reconstruction/held_out/pictures/") for name in uninterrupted) == NUM_SAMPLES
    metrics = json.loads(uninterrupted["metrics.json"])
    parts = [json.loads(uninterrupted[f"{task}/held_out/metrics.json"]) for task in ("caption", "reconstruction")]
    assert metrics["results"] == parts
    assert metrics["results"][0]["metrics"]["fully_right"]["n"] == NUM_SAMPLES
    assert {"torch", "transformers", "lavit-hf"} <= set(metrics["versions"])


def test_a_complete_evaluation_is_only_scored_again(evaluated, tmp_path, monkeypatch):
    def tasks(**options):
        return [TASKS["caption"](read_data("scenes", "caption", num_samples=4), {"max_new_tokens": 5, **options})]

    first = evaluate(evaluated, tasks(), tmp_path, batch_size=3, progress=False)
    before = contents(tmp_path)
    monkeypatch.setattr(TASKS["caption"], "predict", lambda *_: pytest.fail("predicted again"))
    assert evaluate(evaluated, tasks(), tmp_path, batch_size=1, progress=False) == first
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="made from other data, by another checkpoint or with other options"):
        evaluate(evaluated, tasks(num_beams=1), tmp_path, progress=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("config.visual_tokenizer_config", "selection", "argmax"),
        ("generation_config", "repetition_penalty", 1.5),
        ("processor", "visual_mode", "discrete"),
    ],
)
def test_another_configuration_is_another_checkpoint(evaluated, tmp_path, part, name, value):
    """Regression: predictions were scored again under a configuration that they were not made with."""
    task = TASKS["caption"](read_data("scenes", "caption", num_samples=1), {"max_new_tokens": 5})
    evaluate(evaluated, [task], tmp_path, progress=False)
    model, processor = copy.deepcopy(evaluated.model), copy.copy(evaluated.processor)
    changed = processor if part == "processor" else operator.attrgetter(part)(model)
    assert getattr(changed, name) != value
    setattr(changed, name, value)
    with pytest.raises(ValueError, match=f"{name}: .* there, {value} now"):
        evaluate(EvaluatedCheckpoint("x", model, processor), [task], tmp_path, progress=False)


def test_a_task_comes_once(evaluated, tmp_path):
    task = TASKS["caption"](read_data("scenes", "caption", num_samples=1))
    with pytest.raises(ValueError, match="once per split"):
        evaluate(evaluated, [task, task], tmp_path)


def test_a_table_per_task():
    def result(task: str, split: str | None, **metrics: Measurement) -> dict:
        found = {name: measurement.to_dict() for name, measurement in metrics.items()}
        return {"task": task, "data": "data", "split": split, "num_samples": 7, "metrics": found}

    share = Measurement(0.9512, 7, "scenes", (0.9, 1.0), is_share=True)
    text = format_metrics(
        {
            "results": [
                result("caption", "held_out", color=share, tokens=Measurement(9.5, 7, "images", (8.25, 10.0))),
                result("vqa", None, nothing=Measurement(None, 0), cider=Measurement(1.3333, 7)),
            ]
        }
    )
    assert text.splitlines() == [
        "caption (data, held_out, 7 samples)",
        "  color   95.1 %  [90.0, 100.0]    7 scenes",
        "  tokens   9.500  [8.250, 10.000]  7 images",
        "",
        "vqa (data, 7 samples)",
        "  nothing      -    0 samples",
        "  cider    1.333    7 samples",
    ]


def test_names_from_data_stay_on_their_line():
    measured = Measurement(0.5, 7, "a\x1b[2J\nb").to_dict()
    result = {"task": "vqa", "data": "my\ndata", "split": "te\rst", "num_samples": 7, "metrics": {"x\ny": measured}}
    title, row = format_metrics({"results": [result]}).split("\n")
    assert title == "vqa (my data, te st, 7 samples)"
    assert row == "  x y  0.500    7 a [2J b"


def test_long_questions_come_first_and_share_batches(evaluated, tmp_path: Path) -> None:
    questions = ["a?", "a long question?", "b?", "another long one?", "middle one?"]
    samples = [
        EvaluationSample(str(number), Image.new("RGB", (8, 8)), ("yes",), question=question)
        for number, question in enumerate(questions)
    ]
    asked: list[list[str]] = []

    class Asked(VqaTask):
        def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
            asked.append([sample.question or "" for sample in samples])
            return [Prediction({"prediction": sample.question}) for sample in samples]

    task = Asked(EvaluationData("questions", None, samples))
    evaluate(evaluated, [task], tmp_path, batch_size=2, progress=False)
    assert asked == [["another long one?", "a long question?"], ["middle one?", "a?"], ["b?"]]
    lines = (tmp_path / "vqa" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == questions  # in the order of the data


def test_what_is_not_finished_is_shared(evaluated, tmp_path: Path) -> None:
    """Regression: shares were those of a whole evaluation, and what was left could be that of a single process."""
    picture = Image.new("RGB", (8, 8))
    samples = [EvaluationSample(str(number), picture, ("yes",), question="a?") for number in range(8)]
    computed = []
    for process in range(2):

        class Counted(VqaTask):
            def predict(
                self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]
            ) -> list[Prediction]:
                computed.append((process, [sample.id for sample in samples]))  # noqa: B023
                return [Prediction({"prediction": ""}) for _ in samples]

        directory = PredictionDirectory(tmp_path / str(process))
        directory.open({})
        with directory.writer(0) as writer:
            for number in (0, 1, 3, 4, 5):  # of the batches 0 to 3, the first and third are complete
                writer.write({"id": str(number)})
        state = SimpleNamespace(
            process_index=process, num_processes=2, device="cpu", is_main_process=False, wait_for_everyone=lambda: None
        )
        _predict(evaluated, Counted(EvaluationData("questions", None, samples)), directory, state, 2, False)
        assert set(directory.finished()) == {"0", "1", "3", "4", "5", *computed[-1][1]}
    assert computed == [(0, ["2", "3"]), (1, ["6", "7"])]


def test_images_are_read_ahead_by_one_batch(tmp_path: Path) -> None:
    """They are the same, whatever the file says about them, and only two batches are in memory."""
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        picture = Image.new("P", (4, 2), 1)
        picture.putpalette([0, 0, 0, 200, number, 0])
        exif = picture.getexif()
        exif[0x0112] = 6  # turned
        picture.putpixel((0, 0), 0)
        picture.save(path, transparency=0, exif=exif)
    samples = [EvaluationSample(str(number), path) for number, path in enumerate(paths)]
    taken: list[int] = []

    def batches() -> Iterator[list[EvaluationSample]]:
        for number in range(3):
            taken.append(number)
            yield samples[2 * number : 2 * number + 2]

    read = _with_images(batches())
    first = next(read)
    assert taken == [0, 1]
    for sample, other in zip([*first, *(one for batch in read for one in batch)], samples, strict=True):
        assert isinstance(sample.image, Image.Image) and sample.id == other.id
        assert sample.open_image().size == (2, 4)
        assert sample.open_image().tobytes() == other.open_image().tobytes()


def test_an_image_that_cannot_be_read_is_named_when_its_batch_comes(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"nothing")
    samples = [EvaluationSample("0", Image.new("RGB", (8, 8))), EvaluationSample("1", tmp_path / "1.png")]
    read = _with_images([sample] for sample in samples)
    assert next(read)[0].id == "0"
    with pytest.raises(ValueError, match="Sample 1: the image cannot be read"):
        next(read)
