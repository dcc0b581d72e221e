"""SIGTERM saves a checkpoint and ends every script well."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer

from lavit_hf.training import CheckpointCallback, find_trainer_checkpoint
from tiny_parts import CHECKPOINT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMON = {"num_scenes": 16, "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
COMMON |= {"dataset": "scenes", "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
STAGES = {
    "train_tokenizer": {"vision_model": CHECKPOINT, "learning_rate": 0.0},
    "train_lm": {"model": CHECKPOINT},
    "train_pixel_decoder": {"pixel_decoder": CHECKPOINT, "visual_tokenizer": CHECKPOINT},
    "train_autoencoder": {"validation_split": "validation", "height": 32, "width": 32, "num_validation_rows": 4},
    "finetune_lora": {"model": CHECKPOINT},
}


def arguments(script: str, folder: Path, **options: object) -> list[str]:
    values = {**COMMON, **STAGES[script], "output_dir": folder, **options}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("script", STAGES)
def test_sigterm_saves_and_the_next_run_goes_on(monkeypatch, tmp_path, script):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = importlib.import_module(script).main
    steps = []
    compute = Trainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(arguments(script, tmp_path / "out"))
    assert stop.value.code == 0 and steps == [0, 1] and signal.getsignal(signal.SIGTERM) is before
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if name.startswith("checkpoint-")] == ["checkpoint-2"]
    assert find_trainer_checkpoint("latest", tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert not [name for name in names if name.endswith((".safetensors", "model_index.json"))], "nothing finished"
    trainer = main(arguments(script, tmp_path / "out", resume_from_checkpoint="latest"))
    assert trainer.state.global_step == 6 and steps == [0, 1, 2, 3, 4, 5]


def test_worker_processes_are_ended_by_it():
    """They inherit the handler when they are forked, and `DataLoader` ends those that hang with SIGTERM."""
    code = (
        "import os, signal\n"
        "from lavit_hf.training import CheckpointCallback\n"
        "callback = CheckpointCallback()\n"
        "callback._process = os.getpid()\n"
        "signal.signal(signal.SIGTERM, callback._ask_to_stop)\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), callback._is_asked_to_stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGTERM), "False"]
    assert CheckpointCallback()._is_asked_to_stop is False
