"""Stage 2 with plain `Trainer`: what of it has to work unchanged."""

import json
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers.trainer
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from tiny_parts import CHECKPOINT, picture_rows
from training import tiny_training
from training.tiny_training import BATCH_SIZE, NUM_SAMPLES, build_trainer, losses, script_environment


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without any extras, to compare with."""
    trainer = build_trainer(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return trainer


def test_the_loss_falls(plain):
    assert len(losses(plain)) == 3 * -(-NUM_SAMPLES // BATCH_SIZE)
    assert sum(losses(plain)[-3:]) < 0.7 * sum(losses(plain)[:3])


def test_accumulated_gradients_are_those_of_the_whole_batch(plain, tmp_path):
    """Micro-batches hold different numbers of labels, so this needs the right `num_items_in_batch`."""
    trainer = build_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH_SIZE)
    trainer.train()
    torch.testing.assert_close(losses(trainer), losses(plain), atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(plain, tmp_path):
    trainer = build_trainer(tmp_path, gradient_checkpointing=True)
    trainer.train()
    torch.testing.assert_close(losses(trainer), losses(plain), atol=1e-5, rtol=1e-5)


def test_compiled_training(tmp_path):
    """With ids alone: how many tokens an image becomes breaks graphs, which is slow to test."""
    arguments = {"max_steps": 2, "collator": {"image_first_probability": 0.0, "pad_to_multiple_of": 128}}
    found = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = build_trainer(tmp_path, **arguments, **compiled)
        trainer.train()
        found.append(losses(trainer))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_packed_training(tmp_path):
    collators = [{"image_first_probability": 0.0, "packing": packing, "max_length": 64} for packing in (False, True)]
    found = []
    for collator in collators:
        trainer = build_trainer(tmp_path, collator=collator, num_train_epochs=1)
        trainer.train()
        found.append(losses(trainer))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_only_what_should_learn_has_changed(plain):
    before = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).state_dict()
    changed = {name for name, value in plain.model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("vision_model", "discrete", "selector")
    assert not any(part in name for name in changed for part in frozen)
    for part in ("continuous.merger", "multi_modal_projector", "embed_tokens", "lm_head", "layers.1.mlp"):
        assert any(part in name for name in changed)


def test_evaluation(plain):
    metrics = plain.evaluate()
    assert metrics["eval_loss"] > 0 and plain.evaluate()["eval_loss"] == metrics["eval_loss"]
    plain.compute_metrics = lambda prediction: {"width": prediction.predictions.shape[-1]}
    assert plain.evaluate()["eval_width"] == 366, "logits, and nothing else of the output"
    plain.compute_metrics = None


def test_batches_of_similar_length(tmp_path):
    trainer = build_trainer(tmp_path, train_sampling_strategy="group_by_length", num_train_epochs=1)
    trainer.train_dataset = TrainingDataset(picture_rows(64))
    with pytest.raises(ValueError, match="input_ids"):
        trainer.get_train_dataloader()
    trainer.train_dataset.measure_lengths(trainer.processing_class)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.data_collator = lambda samples: [len(sample["input_ids"]) for sample in samples]
    grouped: DataLoader = trainer.get_train_dataloader()
    spreads = [max(batch) - min(batch) for batch in grouped]
    assert len(spreads) == 64 / BATCH_SIZE
    assert sum(spreads) < len(spreads) * (max(lengths) - min(lengths)) / 3, "most batches are of one length"


def test_batches_of_similar_length_do_not_depend_on_the_number_of_processes():
    """Regression: an epoch that went on in another number of processes repeated rows, and left others out."""
    orders = []
    for processes, size in ((1, 8), (4, 2)):
        sampler = LengthGroupedSampler(size, lengths=[index * 37 % 101 for index in range(2000)])
        loader = SimpleNamespace(batch_sampler=SimpleNamespace(sampler=sampler))
        args = SimpleNamespace(
            seed=0, data_seed=None, train_batch_size=size, gradient_accumulation_steps=1, world_size=processes
        )
        EpochCallback().on_epoch_begin(args, TrainerState(), TrainerControl(), train_dataloader=loader)
        orders.append(list(sampler))
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(2000))


def test_lengths_of_a_plain_dataset(tmp_path):
    """Rows that were tokenized before need no TrainingDataset."""
    table = {
        "codes": [[list(range(index % 5))] for index in range(12)],
        "text": ["cat " * (1 + index % 5) for index in range(12)],
        "length": [2 * (index % 5) for index in range(12)],
        "sample_id": list(range(12)),
    }
    trainer = build_trainer(tmp_path, train_sampling_strategy="group_by_length", max_steps=2)
    trainer.train_dataset = datasets.Dataset.from_dict(table)
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("kind", ["TrainingDataset", "datasets.Dataset"])
def test_forgetting_to_keep_unused_columns(tmp_path, kind):
    trainer = build_trainer(tmp_path, remove_unused_columns=True)
    if kind == "datasets.Dataset":
        trainer.train_dataset = datasets.Dataset.from_list([{"codes": [[1]], "text": "a", "sample_id": 0}])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_arguments_of_push_to_hub(tmp_path, monkeypatch):
    uploads = []

    def create_repo(*args, **kwargs):
        return type("Url", (), {"repo_id": "me/lavit"})

    def upload_folder(*args, **kwargs):
        uploads.append(kwargs)

    for function in (create_repo, upload_folder):
        monkeypatch.setattr(HfApi, function.__name__, function)
        # Older versions of transformers call functions that were bound before.
        monkeypatch.setattr(transformers.trainer, function.__name__, function, raising=False)
    trainer = build_trainer(
        tmp_path, push_to_hub=True, hub_model_id="lavit", hub_private_repo=True, hub_strategy="end", max_steps=1
    )
    trainer.train()
    trainer.push_to_hub(commit_message="done")
    assert uploads[-1]["repo_id"] == "me/lavit"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= names


def test_a_trained_model_loads_and_generates(plain, tmp_path):
    plain.save_model(tmp_path)
    model = LavitForConditionalGeneration.from_pretrained(tmp_path)
    processor = ImageTextProcessor.from_pretrained(tmp_path)
    image = picture_rows(1)[0]["image"]
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    plain.model.eval()
    expected = plain.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


# A run that is killed and resumed is the run that was not.


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


# Two processes give what one gives with batches twice as large.


def test_two_processes_equal_one_with_twice_the_batch(python, tmp_path):
    """Rows without images leave parameters without gradient in one process and not in the other."""
    # Of a number that does not divide, accelerate would repeat samples.
    arguments = {"num_samples": 3 * BATCH_SIZE}
    options = {
        "output_dir": str(tmp_path),
        "arguments": {**arguments, "per_device_train_batch_size": BATCH_SIZE // 2},
    }
    # `--multi_gpu` is accelerate's name for its launcher of several processes; `--cpu` would start a single one.
    command = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", tiny_training.__file__, json.dumps(options)]
    run = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes DistributedDataParallel" in run.stdout
    single = build_trainer(tmp_path / "single", **arguments)
    single.train()
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == len(losses(single)) == 9
    torch.testing.assert_close(found, losses(single), atol=1e-5, rtol=1e-5)
    trained = type(single.model).from_pretrained(tmp_path).state_dict()
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-3, rtol=1e-3, msg=name)
