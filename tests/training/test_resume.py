"""A run that is killed and resumed is the run that was not."""

import json
import signal
import subprocess
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from training import tiny_training
from training.tiny_training import build_trainer, losses, script_environment

# Three steps per epoch: the checkpoint at step 4 lies within the second one.
SAVING = {"save_strategy": "steps", "save_steps": 2}
KILLED_AT = 5


def test_resuming_after_a_kill_is_bit_equal(python, tmp_path):
    expected = build_trainer(tmp_path / "whole")
    expected.train()

    options = {"output_dir": str(tmp_path / "killed"), "kill_at": KILLED_AT, "arguments": SAVING}
    run = subprocess.run(
        [python, tiny_training.__file__, json.dumps(options)],
        env={**script_environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    checkpoint = get_last_checkpoint(tmp_path / "killed")
    assert Path(checkpoint).name == "checkpoint-4"

    resumed = build_trainer(tmp_path / "killed", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(expected)
    state = resumed.model.state_dict()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_without_the_callback_the_resumed_epoch_is_another(tmp_path):
    """Says what EpochCallback does in a resumed epoch: the dataset would think that it is in epoch 0."""
    epochs = []
    for is_told in (True, False):
        trainer = build_trainer(tmp_path, **SAVING, max_steps=5)
        trainer.train()
        trainer = build_trainer(tmp_path, **SAVING, max_steps=5)
        if not is_told:
            trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if hasattr(c, "_epoch")))
        collate = trainer.data_collator
        seen: list[int] = []
        trainer.data_collator = lambda samples, seen=seen, collate=collate: (
            seen.extend(sample["epoch"] for sample in samples) or collate(samples)
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        epochs.append(set(seen))
    assert epochs == [{1}, {0}]


def test_batches_by_length_are_the_same_after_resuming(tmp_path):
    """In the second epoch; the sampler of transformers alone would come to others."""
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-8")):
        trainer = build_trainer(
            tmp_path,
            num_samples=20,
            num_train_epochs=2,
            train_sampling_strategy="group_by_length",
            save_strategy="steps",
            save_steps=8,
        )
        trainer.train_dataset.measure_lengths(trainer.processing_class)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(losses(trainer))
    assert len(found[0]) == 10 and found[0] == found[1]
