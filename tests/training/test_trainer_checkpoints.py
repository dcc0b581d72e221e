"""Checkpoints that `Trainer` did not finish are not resumed from."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lavit_hf.training import CheckpointCallback, FiniteGradientsCallback, StreamTrainer
from lavit_hf.training.trainer_checkpoints import find_trainer_checkpoint, why_incomplete
from tiny_parts import CHECKPOINT
from training.tiny_training import build_trainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_lm.py"

# Runs the example until it is killed in the middle of its second checkpoint, before the method that is named writes.
KILLED = """
import os, runpy, signal, sys
from transformers import Trainer

method = getattr(Trainer, sys.argv[1])

def die_in_the_second(self, *args, **kwargs):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(Trainer, sys.argv[1], die_in_the_second)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    build_trainer(folder, save_strategy="steps", save_steps=2, max_steps=4).train()
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_the_last_one(run, tmp_path):
    assert find_trainer_checkpoint("latest", run) == str(run / "checkpoint-4")
    assert find_trainer_checkpoint(str(run / "checkpoint-2"), run) == str(run / "checkpoint-2")
    assert find_trainer_checkpoint(None, run) is None
    assert find_trainer_checkpoint("latest", tmp_path / "nowhere") is None
    (run / "checkpoint-4").rename(run / "checkpoint-10")  # 10 is more than 2
    (run / "checkpoint-old").mkdir()
    assert find_trainer_checkpoint("latest", run) == str(run / "checkpoint-10")


def truncate(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-10])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"a": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("trainer_state.json"), "it has no trainer_state.json"),
        (truncate("trainer_state.json"), "trainer_state.json is damaged"),
        (remove("model.safetensors"), "it has no weights"),
        (truncate("model.safetensors"), "model.safetensors is missing or damaged"),
        (truncate("optimizer.pt"), "optimizer.pt is missing or damaged"),
        (truncate("rng_state.pth"), "rng_state.pth is missing or damaged"),
        (lose_a_shard, "model-00002-of-00002.safetensors is missing or damaged"),
    ],
)
def test_incomplete_ones_are_skipped(run, damage, reason):
    assert why_incomplete(run / "checkpoint-4") is None
    damage(run / "checkpoint-4")
    assert why_incomplete(run / "checkpoint-4") == reason
    assert find_trainer_checkpoint("latest", run) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-4 is no complete checkpoint: {reason}"):
        find_trainer_checkpoint(str(run / "checkpoint-4"), run)
    damage(run / "checkpoint-2")
    assert find_trainer_checkpoint("latest", run) is None


class _Evil:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"])
def test_states_that_could_run_code_are_named_and_not_loaded(run, monkeypatch, name):
    monkeypatch.chdir(run)
    torch.save({"state": _Evil()}, run / "checkpoint-4" / name)
    for checkpoint in ("latest", str(run / "checkpoint-4")):
        with pytest.raises(ValueError, match=f"checkpoint-4/{name} holds more than data") as error:
            find_trainer_checkpoint(checkpoint, run)
        report = "".join(traceback.format_exception(error.value))
        assert "weights_only" not in report  # torch's advice is to switch the check off
    assert not (run / "ran-code").exists()


def test_trainer_runs_no_code_either(run, monkeypatch):
    """A checkpoint is handed to `Trainer` as it is."""
    monkeypatch.chdir(run)
    torch.save({"state": _Evil()}, run / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        build_trainer(run, max_steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not (run / "ran-code").exists()


def test_a_checkpoint_without_the_optimizer_is_said_to_be_one(run, caplog):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    assert find_trainer_checkpoint("latest", run) == str(run / "checkpoint-4")
    assert "holds no state of the optimizer" in caplog.text


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_script_that_was_killed_while_it_saved_goes_on(python, tmp_path, method):
    options = {
        "model": CHECKPOINT,
        "dataset": "scenes",
        "num_scenes": 16,
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": tmp_path / "out",
    }
    arguments = [str(EXAMPLE), *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, "-c", KILLED, method, *arguments]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))[0] == "checkpoint-2"
    command = [python, *arguments, "--resume_from_checkpoint", "latest"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5
    assert find_trainer_checkpoint("latest", tmp_path / "out") == str(tmp_path / "out" / "checkpoint-5")


class SpoilTheLoss(TrainerCallback):
    """Makes the loss NaN from an update on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.data[0] = float("nan")


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_training_stops_before_spoiled_weights_are_saved(tmp_path, logging_steps):
    """Regression: `Trainer` logged a loss of 0 for a thousand updates of NaN."""
    callbacks = [SpoilTheLoss(), FiniteGradientsCallback()]
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": logging_steps}
    trainer = build_trainer(tmp_path, callbacks, **options)
    update = 3 if logging_steps == 1 else 4
    with pytest.raises(FloatingPointError, match=rf"grad_norm is nan in update {update}: training stops before"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


@pytest.mark.parametrize("save_strategy", ["epoch", "no"])
def test_spoiled_weights_are_found_without_a_log_in_time(tmp_path, save_strategy):
    """Regression: a checkpoint of an epoch, and the weights in the end, were saved without a look at them."""
    callbacks = [SpoilTheLoss(), FiniteGradientsCallback()]
    options = {"save_strategy": save_strategy, "num_train_epochs": 1, "max_steps": -1, "logging_steps": 100}
    trainer = build_trainer(tmp_path, callbacks, **options)
    with pytest.raises(FloatingPointError, match="grad_norm is nan"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_training_that_failed_leaves_sigterm_as_it_was(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            assert signal.getsignal(signal.SIGTERM) != before
            raise RuntimeError("out of memory, or so")

    before = signal.getsignal(signal.SIGTERM)
    trainer = build_trainer(tmp_path, [CheckpointCallback(), Fail()], trainer_class=StreamTrainer, max_steps=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
