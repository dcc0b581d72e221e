import re

import pytest
import torch

import tiny_models
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling

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
