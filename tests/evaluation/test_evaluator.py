"""Evaluation as a whole: killed and resumed, by one process and by two, it gives the same to the last bit."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import tiny_evaluation
from evaluation.tiny_evaluation import BATCH_SIZE, NUM_SAMPLES
from lavit_hf.evaluation import TASKS, evaluate, read_data

BATCHES = -(-NUM_SAMPLES // BATCH_SIZE)


def run_script(checkpoint: Path, output: Path, num_batches: int = 0, launcher: tuple[str, ...] = ()):
    command = [sys.executable, *launcher, tiny_evaluation.__file__, str(checkpoint), str(output), str(num_batches)]
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


def test_killed_and_resumed(evaluated, random_checkpoint, tmp_path, uninterrupted):
    result = run_script(random_checkpoint, tmp_path, num_batches=BATCHES + 2)  # in the midst of the second task
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    shard = tmp_path / "reconstruction" / "held_out" / "shards" / "00000.jsonl"
    assert shard.read_bytes().count(b"\n") == 2 * BATCH_SIZE and shard.read_bytes().endswith(b'{"id": "00000')
    assert not (tmp_path / "metrics.json").exists()
    tiny_evaluation.run(evaluated, tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_two_processes_give_the_same_as_one(random_checkpoint, tmp_path, uninterrupted):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    result = run_script(random_checkpoint, tmp_path, launcher=launcher)
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
    with pytest.raises(ValueError, match="made from other data, of another checkpoint or with other options"):
        evaluate(evaluated, tasks(num_beams=1), tmp_path, progress=False)
    assert contents(tmp_path) == before


def test_a_task_comes_once(evaluated, tmp_path):
    task = TASKS["caption"](read_data("scenes", "caption", num_samples=1))
    with pytest.raises(ValueError, match="once per split"):
        evaluate(evaluated, [task, task], tmp_path)
