"""Evaluation as a whole: killed and resumed, by one process and by two, it gives the same to the last bit."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lavit_hf.evaluation import TASKS, evaluate, read_data

OPTIONS = ["--task", "caption", "--task", "reconstruction", "--data", "scenes", "--split", "held_out"]
OPTIONS += ["--num-samples", "7", "--batch-size", "2", "--steps", "2", "--max-new-tokens", "5", "--beams", "1"]
# Dies in the middle of a line, after its third batch.
KILLED = """
import os, signal
import lavit_cli
from lavit_hf.evaluation.predictions import PredictionWriter

finish, batches = PredictionWriter.flush, []

def flush(writer):
    finish(writer)
    batches.append(writer)
    if len(batches) == {batches}:
        writer._file.write(b'{{"id": "00000')
        writer._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

PredictionWriter.flush = flush
lavit_cli.main()
"""


def run(command: list[str], checkpoint: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *command, "evaluate", str(checkpoint), *OPTIONS, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(random_checkpoint, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    result = run(["-m", "lavit_cli"], random_checkpoint, output)
    assert result.returncode == 0, result.stderr[-3000:]
    return contents(output)


def test_killed_and_resumed(random_checkpoint, tmp_path, uninterrupted):
    for batches in (3, 3):  # the second time within the other task
        result = run(["-c", KILLED.format(batches=batches)], random_checkpoint, tmp_path / "out")
        assert result.returncode == -signal.SIGKILL
    unfinished = tmp_path / "out" / "reconstruction" / "held_out" / "shards" / "00000.jsonl"
    assert unfinished.read_bytes().endswith(b'{"id": "00000') and not (tmp_path / "out" / "metrics.json").exists()
    result = run(["-m", "lavit_cli"], random_checkpoint, tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "out") == uninterrupted


def test_two_processes_give_the_same_as_one(random_checkpoint, tmp_path, uninterrupted):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    result = run([*launcher, "-m", "lavit_cli"], random_checkpoint, tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "out") == uninterrupted
    assert result.stdout.count("Wrote ") == 1


def test_what_is_written(uninterrupted):
    assert {name.rpartition("/")[2] for name in uninterrupted if "pictures" not in name} == {
        "metrics.json",
        "predictions.jsonl",
        "samples.html",
        "samples.png",
        "settings.json",
    }
    lines = uninterrupted["caption/held_out/predictions.jsonl"].decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{index:06d}" for index in range(7)]
    assert sum(name.startswith("reconstruction/held_out/pictures/") for name in uninterrupted) == 7
    metrics = json.loads(uninterrupted["metrics.json"])
    parts = [json.loads(uninterrupted[f"{task}/held_out/metrics.json"]) for task in ("caption", "reconstruction")]
    assert metrics["results"] == parts
    assert metrics["results"][0]["metrics"]["fully_right"]["n"] == 7
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
