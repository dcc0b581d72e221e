"""`lavit evaluate`: what it prints, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lavit_hf import default_checkpoint
from lavit_hf.data.worlds import WORLDS
from lavit_hf.evaluation import format_metrics
from lavit_hf.hub.facts import world_of

FAST = ["--max-new-tokens", 4, "--beams", 1, "--steps", 2]


def test_all_tasks_of_scenes_in_one_command(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    command = ["evaluate", random_checkpoint, "--task", "all", "--data", "scenes", "--output", tmp_path / "out"]
    splits = ["--split", "validation", "--split", "held_out"]
    result = lavit(*command, *splits, "--num-samples", 3, "--num-drawings", 2, *FAST)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result.stdout == f"{format_metrics(metrics)}\n\nWrote {tmp_path / 'out' / 'metrics.json'}\n"
    found = [(part["task"], part["split"], part["num_samples"]) for part in metrics["results"]]
    assert [(task, split) for task, split, _ in found] == [
        (task, split)
        for task in ("caption", "vqa", "text-to-image", "reconstruction", "editing")
        for split in ("validation", "held_out")
    ]
    assert [count for task, _, count in found if task != "vqa"] == [3, 3, 2, 2, 2, 2, 2, 2]
    assert metrics["checkpoint"] == random_checkpoint.name
    assert metrics["results"][0]["options"]["max_new_tokens"] == 4
    assert metrics["results"][-1]["options"]["num_inference_steps"] == 2


def test_help_names_all_worlds(lavit) -> None:
    assert set(WORLDS) <= set(re.findall(r"[\w-]+", lavit("evaluate", "--help").stdout))


def test_a_benchmark(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    content = {}
    for number, (color, answer) in enumerate([("red", "red"), ("blue", "blue")]):
        Image.new("RGB", (32, 32), color).save(images / f"{number}.jpg")
        content[str(number)] = {"imageId": str(number), "question": "What color is it?", "answer": answer}
    (tmp_path / "questions.json").write_text(json.dumps(content))
    command = ["evaluate", random_checkpoint, "--data", tmp_path / "questions.json", "--images", images]
    result = lavit(*command, "--task", "vqa", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "exact_match/other" in result.stdout
    for path in (tmp_path / "out" / "metrics.json", tmp_path / "out" / "vqa" / "metrics.json"):
        assert str(tmp_path) not in path.read_text() and '"questions.json"' in path.read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "vqa" / "samples.html").read_text()
    lines = (tmp_path / "out" / "vqa" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["references"] for line in lines] == [["red"], ["blue"]]


def test_all_tasks_are_those_that_the_data_fit(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "0.jpg")
    content = {"0": {"imageId": "0", "question": "What color is it?", "answer": "red"}}
    (tmp_path / "questions.json").write_text(json.dumps(content))
    command = ["evaluate", random_checkpoint, "--data", tmp_path / "questions.json", "--task", "all", *FAST]
    result = lavit(*command, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert [one["task"] for one in results] == ["vqa", "reconstruction"]
    assert "Left out, as questions.json does not fit: caption, text-to-image\n" in result.stderr


def test_own_data_is_asked_as_by_lavit_ask(lavit, tmp_path: Path) -> None:
    """Regression: the paper's settings, which the checkpoint that comes along is not for, made all answers wrong."""
    rows = []
    for index, scene in enumerate(world_of(default_checkpoint()).make_dataset("validation", 4)):
        scene["image"].save(tmp_path / f"{index}.png")
        rows += [
            {"image": f"{index}.png", "question": one["question"], "answer": one["answer"]}
            for one in scene["questions"][:2]
        ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "evaluate",
        default_checkpoint(),
        "--data",
        tmp_path / "own.jsonl",
        "--task",
        "vqa",
        "--output",
        tmp_path / "out",
    ]
    result = lavit(*command)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert found["metrics"]["exact_match"]["value"] == 1 and found["metrics"]["exact_match"]["n"] == 8


def test_clear_errors(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    def error(*options, task="caption", data="scenes") -> str:
        command = ["evaluate", random_checkpoint, "--task", task, "--data", data, "--output", tmp_path / "out"]
        result = lavit(*command, *options)
        assert result.exit_code == 1, result.output
        assert not (tmp_path / "out").exists()
        return result.stderr.splitlines()[-1]

    assert "no split of the scenes" in error("--split", "test")
    assert "None of the tasks has a use for guidance_scale=2.0" in error("--guidance-scale", 2)
    assert "nowhere.json does not exist" in error(data=tmp_path / "nowhere.json")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "0.png")
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "black"}')
    message = error(data=tmp_path / "pictures")
    assert "has no split 'test'; it has train" in message and "--split train" in message
    assert "--images takes a directory" in error("--images", tmp_path / "nowhere")
    assert "--annotations takes a file" in error("--annotations", tmp_path)
    assert "--inception takes" in error("--fid-weights", tmp_path / "nowhere.pt", task="text-to-image")


@pytest.mark.parametrize("name", ["mine.txt", "caption/validation/mine.txt"])
def test_other_files_are_left_alone(lavit, random_checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    command = ["evaluate", random_checkpoint, "-t", "caption", "--data", "scenes", "--num-samples", 1, *FAST[:4]]
    result = lavit(*command, "--output", tmp_path)
    assert result.exit_code == (0 if name == "mine.txt" else 1), result.output
    assert (tmp_path / name).read_text() == "mine"


def test_budgets(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    command = ["evaluate", random_checkpoint, "--data", "scenes", "-t", "caption", "--num-samples", 2]
    command += ["--max-new-tokens", 4, "--num-tokens", 3]
    one = lavit(*command, "-o", tmp_path / "one")
    assert one.exit_code == 0, one.output
    (result,) = json.loads((tmp_path / "one" / "metrics.json").read_text())["results"]
    assert result["metrics"]["tokens/continuous/mean"]["value"] == result["options"]["num_image_tokens"] == 3
    several = lavit(*command, "--num-tokens", 5, "-o", tmp_path / "curve")
    assert several.exit_code == 0, several.output
    assert several.stdout.splitlines()[1].split() == ["tokens", "3", "5", "own"]
    assert f"Wrote {tmp_path / 'curve' / 'curve.png'}" in several.stdout
    useless = lavit(
        "evaluate", random_checkpoint, "--data", "scenes", "-t", "text-to-image", "--num-tokens", 3, "-o", "x"
    )
    both = lavit(*command, "-t", "text-to-image", "--num-tokens", 5, "-o", tmp_path / "curve")
    assert both.exit_code == 0 and "Left out, as it sees no images and has no budget: text-to-image" in both.stderr
    assert useless.exit_code == 1 and "None of the tasks has a use for num_image_tokens=3" in useless.stderr
