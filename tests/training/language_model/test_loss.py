"""The loss with label smoothing that is passed to `Trainer`."""

import pickle

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.training import LanguageModelingLoss, get_lora_config
from tiny_parts import CHECKPOINT
from training.tiny_training import BATCH_SIZE, build_trainer, losses

VOCAB = 366


@pytest.fixture(scope="module")
def model() -> LavitForConditionalGeneration:
    return LavitForConditionalGeneration.from_pretrained(CHECKPOINT)


def example(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels that have an ignored id and a placeholder among them, and what counts of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, VOCAB, generator=generator)
    labels = torch.randint(3, VOCAB - 2, (2, 7), generator=generator)
    labels[0, 2], labels[1, 4] = -100, model.config.image_token_id
    counts = torch.ones(2, 7, dtype=torch.bool)
    counts[0, 2] = counts[1, 4] = counts[:, 0] = False
    return logits, labels, counts


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_the_smoothed_cross_entropy_of_shifted_labels(model, smoothing):
    logits, labels, counts = example(model)
    predicted, targets = logits[:, :-1][counts[:, 1:]], labels[counts]
    expected = F.cross_entropy(predicted, targets, label_smoothing=smoothing)
    loss = LanguageModelingLoss(model, smoothing)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    torch.testing.assert_close(loss((logits,), labels), expected)
    torch.testing.assert_close(loss({"logits": logits}, labels, num_items_in_batch=5), expected * 10 / 5)
    torch.testing.assert_close(loss({"logits": logits}, labels, torch.tensor(40)), expected * 10 / 40)


def test_without_smoothing_it_is_the_model_s_own(model):
    _, labels, _ = example(model)
    inputs = {"input_ids": torch.arange(14).view(2, 7) + 3, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        own = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(3))
        outputs = model(**inputs)
    torch.testing.assert_close(LanguageModelingLoss(model)(outputs, labels, torch.tensor(3)), own.loss)


def test_trainer_takes_it(tmp_path):
    """With the tokens of a whole update counted, however they are spread over micro-batches."""
    found = []
    for size, smoothing in ((BATCH_SIZE, None), (BATCH_SIZE, 0.0), (BATCH_SIZE, 0.1), (1, 0.1)):
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH_SIZE // size}
        trainer = build_trainer(tmp_path, num_train_epochs=1, **steps)
        if smoothing is not None:
            trainer.compute_loss_func = LanguageModelingLoss(trainer.model, smoothing)
        trainer.train()
        found.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    plain, unsmoothed, smoothed, accumulated = map(torch.tensor, found)
    torch.testing.assert_close(unsmoothed, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(accumulated, smoothed, atol=1e-4, rtol=1e-4)
    assert (smoothed - plain).abs().min() > 1e-3
    assert smoothed[0] < 1.2 * plain[0], "Trainer's own smoothing has every position predict itself"


def test_adapted_models_have_it_too(model):
    loss = LanguageModelingLoss(get_peft_model(model, get_lora_config(model)), 0.1)
    assert pickle.loads(pickle.dumps(loss)).image_token_id == model.config.image_token_id


def test_wrong_arguments_are_refused(model):
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        LanguageModelingLoss(model, 1.5)
    with pytest.raises(ValueError, match="no `labels`"):
        LanguageModelingLoss(model)({"logits": torch.zeros(1, 2, VOCAB)}, None)
