"""Batches of which no patch is kept, while the merger learns."""

import pytest
import torch

from tiny_models import build_model, light_inputs, random_pixels


@pytest.mark.parametrize("smoothing", [0, 1e-6])
def test_all_layers_run_when_no_patch_is_kept(smoothing):
    """Data parallel training would fail or, if sharded, wait forever otherwise."""
    model = build_model(visual={"attention_smoothing": smoothing}).train()
    merger, selector = model.visual_tokenizer.continuous.merger, model.visual_tokenizer.continuous.selector
    with torch.no_grad():
        selector.out_proj_3.bias[1] += 100.0
    inputs = light_inputs(model, random_pixels(1), [["image", [5, 6, 7]]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    for name, parameter in [*merger.named_parameters(), *model.model.multi_modal_projector.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0, name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs, labels=labels).loss, loss.detach())
        assert model.visual_tokenizer.embed(inputs["pixel_values"]).features.shape == (0, 32)
