"""The original's recorded numbers, module by module."""

import copy

import pytest
import torch

from lavit_hf import LavitTokenDecoder


@pytest.fixture(params=["disc", "cont"])
def branch(request, model, golden):
    """Name in the recording, weights, and output on the recorded pixels of both branches."""
    tokenizer = model.visual_tokenizer
    with torch.no_grad():
        if request.param == "disc":
            return "disc", tokenizer.discrete, tokenizer.encode(golden["pixel_values"])
        return "cont", tokenizer.continuous, tokenizer.embed(golden["pixel_values"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_vision_encoder(branch, golden):
    assert_close(branch[2].patch_features, golden["vit_features"][:, 1:], 5e-5)


def test_selector(branch, golden):
    name, _, output = branch
    assert_close(output.selector_log_probs, golden[f"{name}_selector_logprobs"], 5e-5)
    assert torch.equal(output.keep_mask, golden[f"{name}_keep_mask"].bool())
    assert torch.equal(output.num_tokens, golden[f"{name}_counts"])


@torch.no_grad()
def test_merger(branch, golden):
    name, weights, output = branch
    everything = weights.merger.forward_all(output.patch_features, output.keep_mask)
    assert_close(everything, golden[f"{name}_merger_out"], 5e-6)
    assert_close(output.features, golden[f"{name}_merger_out"][output.keep_mask], 5e-6)


@torch.no_grad()
@pytest.mark.parametrize(("edge", "kept"), [("all_kept", True), ("none_kept", False)])
def test_merger_with_all_or_no_patches(branch, golden, golden_merger, edge, kept):
    name, weights, _ = branch
    features = golden["vit_features"][:, 1:]
    mask = torch.full(features.shape[:2], kept)
    assert_close(weights.merger.forward_all(features, mask), golden_merger[f"{name}_merger_out_{edge}"], 5e-6)


@torch.no_grad()
def test_merger_with_wide_logits(branch, golden, golden_merger):
    name, weights, output = branch
    merger = copy.deepcopy(weights.merger)
    width = output.features.shape[-1]
    for layer in merger.layers:
        layer.self_attn.qkv.weight[: 2 * width] *= 2
        layer.self_attn.qkv.bias[: 2 * width] *= 2
        for projection in (layer.cross_attn.q_proj, layer.cross_attn.k_proj):
            projection.weight *= 2
            projection.bias *= 2
    wide = merger.forward_all(golden["vit_features"][:, 1:], output.keep_mask)
    assert_close(wide, golden_merger[f"{name}_merger_out_wide"], 5e-6)


def test_codes(model, golden):
    output = model.visual_tokenizer.encode(golden["pixel_values"])
    assert torch.equal(output.codes, golden["disc_code_ids"])
    assert_close(output.pre_quantized, golden["disc_kept_pre_quant"], 5e-5)
    assert_close(model.visual_tokenizer.discrete.quantizer.codebook(output.codes), golden["disc_quantized"], 0)


def test_continuous_features(model, golden):
    features = model.get_image_features(pixel_values=golden["pixel_values"])
    assert [len(tokens) for tokens in features.pooler_output] == golden["cont_counts"].tolist()
    assert_close(torch.cat(features.pooler_output), golden["cont_vit_proj_kept"], 5e-5)


@pytest.mark.parametrize(
    ("folder", "condition", "pooled"),
    [
        ("token_decoder", "highres_prompt_embeds", "highres_pooled"),
        ("lowres/token_decoder", "lowres_unet_cond", None),
    ],
)
def test_token_decoders(checkpoint, golden, folder, condition, pooled):
    decoder = LavitTokenDecoder.from_pretrained(checkpoint, subfolder=folder)
    output = decoder(golden["dec_codes"], golden["dec_counts"])
    assert_close(output.condition, golden[condition], 5e-5)
    if pooled is None:
        assert output.pooled_condition is None
    else:
        assert_close(output.pooled_condition, golden[pooled], 5e-5)
