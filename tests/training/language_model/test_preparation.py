"""What happens to a new model before stage 2 (initial values, freezing), and the loss with label smoothing."""

import pickle
import re

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

import tiny_models
from lavit_hf import LavitForConditionalGeneration
from lavit_hf.training import LanguageModelingLoss, get_lora_config
from lavit_hf.training.language_model.preparation import (
    freeze_for_language_modeling,
    init_code_embeddings,
    init_merger,
    init_projector,
)
from tiny_parts import CHECKPOINT
from training.tiny_training import BATCH_SIZE, build_trainer, losses


def code_rows(model, weight) -> torch.Tensor:
    offset = model.config.visual_token_offset
    return weight[offset : offset + tiny_models.CODEBOOK_SIZE].detach()


def similarities(rows: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(rows - rows.mean(dim=0), dim=-1)
    return rows @ rows.T


@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_are_alike_start_alike(tied):
    model = tiny_models.build_model(tie_word_embeddings=tied)
    offset = model.config.visual_token_offset
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [weight.detach().clone() for weight in tables]
    init_code_embeddings(model)
    codebook = F.normalize(model.visual_tokenizer.discrete.quantizer.codebook.weight.detach(), dim=-1)
    for weight, old in zip(tables, before, strict=True):
        rows, text = code_rows(model, weight), weight[:offset].detach()
        torch.testing.assert_close(similarities(rows), similarities(codebook), atol=1e-4, rtol=0)
        torch.testing.assert_close(rows.mean(dim=0), text.mean(dim=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.var(dim=0, correction=0).sum(), text.var(dim=0, correction=0).sum())
        torch.testing.assert_close(text, old[:offset], atol=0, rtol=0)
    assert torch.equal(*tables) == tied


def test_narrow_embeddings_cannot_hold_the_codebook():
    model = tiny_models.build_model(visual={"codebook_dim": 40})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="width 32 cannot hold a codebook of 40"):
        init_code_embeddings(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_new_merger_passes_kept_patches_on():
    model = tiny_models.build_model().eval()
    pixels = tiny_models.random_pixels(5)
    codes = model.visual_tokenizer.encode(pixels).codes
    init_merger(model)
    output = model.visual_tokenizer.embed(pixels)
    kept = output.patch_features[output.keep_mask]
    torch.testing.assert_close(output.features, F.layer_norm(kept, kept.shape[-1:], eps=1e-6), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.visual_tokenizer.encode(pixels).codes, codes), "what is drawn has a merger of its own"


def test_a_new_merger_learns():
    model = tiny_models.build_model()
    init_merger(model)
    model.visual_tokenizer.embed(tiny_models.random_pixels(5)).features.square().mul(torch.arange(32)).sum().backward()
    merger = model.visual_tokenizer.continuous.merger
    assert all(layer.mlp.fc2.weight.grad.abs().sum() > 0 for layer in merger.layers)


def test_a_merger_that_codes_come_from_does_not_start_anew():
    model = tiny_models.build_model(visual={"share_branches": True})
    with pytest.raises(ValueError, match="share_branches=True"):
        init_merger(model)


@pytest.mark.parametrize("hidden_size", [48, 32])
def test_projected_features_are_rotated(hidden_size):
    model = tiny_models.build_model(hidden_size=hidden_size, head_dim=8)
    pixels = tiny_models.random_pixels(20)
    init_projector(model, pixels, scale=0.5)
    with torch.no_grad():
        features = model.visual_tokenizer.embed(pixels).features
        projected = torch.cat(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(projected.mean(dim=0), torch.zeros(hidden_size), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.square().mean().sqrt(), torch.tensor(0.5), atol=1e-5, rtol=0)
    distances, before = (torch.cdist(rows.double(), rows.double()).float() for rows in (projected, features))
    ratio = (
        projected.norm(dim=-1).square().mean().sqrt() / (features - features.mean(0)).square().sum(-1).mean().sqrt()
    )
    torch.testing.assert_close(distances, before * ratio, atol=1e-3, rtol=1e-3)


def test_narrow_language_models_keep_part_of_it():
    model = tiny_models.build_model(hidden_size=16, head_dim=8)
    init_projector(model, tiny_models.random_pixels(20))
    weight = model.model.multi_modal_projector.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(16) * gram[0, 0], atol=1e-4, rtol=0)


def test_centering_takes_tokens():
    model = tiny_models.build_model()
    with torch.no_grad():
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[0] -= 100  # keeps nothing
    before = model.model.multi_modal_projector.weight.detach().clone()
    with pytest.raises(ValueError, match="2 images have 0 tokens, of which no projection can be made"):
        init_projector(model, tiny_models.random_pixels(2))
    assert torch.equal(model.model.multi_modal_projector.weight, before)


LEARNS = re.compile(
    r"^(lm_head\.|model\.language_model\.|model\.multi_modal_projector\.|model\.visual_tokenizer\.continuous\.merger\.)"
)


def gradients(model) -> set[str]:
    """Names of the parameters that a batch with a continuous image and codes gives a gradient other than zero."""
    inputs = tiny_models.light_inputs(model, tiny_models.random_pixels(1), [["image", [5, 6, 7, 92, 93]]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_exactly_what_learns(checkpointing):
    model = freeze_for_language_modeling(tiny_models.build_model()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    everything = {name for name, _ in model.named_parameters()}
    assert gradients(model) == {name for name in everything if LEARNS.match(name)}
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    # The bias of keys shifts all logits of a query alike, so nothing depends on it; dropout of parts is elsewhere.
    silent = {name for name, grad in grads.items() if not grad.any()}
    assert silent <= {name for name in everything if name.endswith("k_proj.bias")}, silent


def test_shared_branches_keep_their_merger():
    """It would change the codes."""
    model = freeze_for_language_modeling(tiny_models.build_model(visual={"share_branches": True})).train()
    assert not any("visual_tokenizer" in name for name in gradients(model))
    assert model.model.multi_modal_projector.weight.grad.any()


def test_nothing_of_the_language_model_is_thawed():
    model = tiny_models.build_model()
    model.lm_head.requires_grad_(False)
    assert freeze_for_language_modeling(model) is model
    assert not model.lm_head.weight.requires_grad


def test_without_freezing_the_encoder_would_learn():
    model = tiny_models.build_model()
    assert any("vision_model" in name for name in gradients(model))
    torch.testing.assert_close(model.visual_tokenizer.discrete.merger.norm.weight.grad, None)


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
