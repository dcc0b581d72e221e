"""Stage 2 with plain `Trainer`: what of it has to work unchanged."""

import datasets
import pytest
import torch
import transformers.trainer
from huggingface_hub import HfApi
from torch.utils.data import DataLoader

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.dataset import TrainingDataset
from tiny_parts import CHECKPOINT, picture_rows
from training.tiny_training import BATCH_SIZE, NUM_SAMPLES, build_trainer, losses


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
