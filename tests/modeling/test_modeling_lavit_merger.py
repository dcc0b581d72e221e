"""LavitMerger: the published formula, the fast path without smoothing, and a mask that has a gradient."""

import copy

import pytest
import torch

from lavit_hf.modeling.modeling_lavit_merger import padded_positions, relaxed_attention, smoothed_attention
from tiny_models import NUM_PATCHES, build_model, build_visual_tokenizer, light_inputs, random_pixels


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.rand(3, NUM_PATCHES, generator=generator) > 0.5
    uneven = mixed.clone()
    uneven[0], uneven[1] = True, False
    return {
        "all kept": torch.ones_like(mixed),
        "none kept": torch.zeros_like(mixed),
        "mixed": mixed,
        "all, none and some": uneven,
        "one patch each": torch.nn.functional.one_hot(torch.tensor([0, 7, 15]), NUM_PATCHES).bool(),
    }


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
@pytest.mark.parametrize("smoothing", [0, 1e-6])
def test_kept_tokens_equal_those_of_the_dense_computation(mask, smoothing):
    tokenizer = build_visual_tokenizer(attention_smoothing=smoothing)
    merger = tokenizer.discrete.merger
    features = tokenizer.get_patch_features(random_pixels(3))
    torch.testing.assert_close(merger(features, mask), merger.forward_all(features, mask)[mask], atol=2e-6, rtol=1e-5)


def test_without_layers_the_kept_positions_are_found():
    """Regression: positions were left to the last layer, and without one every patch came back."""
    mask = masks()["all, none and some"]
    tokenizer = build_visual_tokenizer(merger_num_layers=0, attention_smoothing=1e-6)
    merger = tokenizer.discrete.merger
    features = tokenizer.get_patch_features(random_pixels(3))
    torch.testing.assert_close(merger(features, mask), merger.norm(features)[mask])


def test_gradients_of_both_computations_agree():
    mask = masks()["all, none and some"]
    tokenizer = build_visual_tokenizer(attention_smoothing=0)
    features = tokenizer.get_patch_features(random_pixels(3)).detach()
    gradients = []
    for compute in (lambda merger: merger(features, mask), lambda merger: merger.forward_all(features, mask)[mask]):
        merger = copy.deepcopy(tokenizer.discrete.merger)
        compute(merger).square().sum().backward()
        gradients.append([parameter.grad for parameter in merger.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_smoothed_weights_follow_the_formula():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 5, 4, generator=generator, dtype=torch.float32) * 3 for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.6
    smoothing = 0.1  # large, so that it shows
    expected = torch.zeros_like(value)
    for batch in range(2):
        for row in range(5):
            logits = [float(query[batch, 0, row] @ key[batch, 0, column]) / 2 for column in range(5)]
            powers = [
                torch.tensor(logit - max(logits)).exp() * mask[batch, 0, row, column]
                for column, logit in enumerate(logits)
            ]
            for column in range(5):
                weight = (powers[column] + smoothing / 5) / (sum(powers) + smoothing)
                expected[batch, 0, row] += weight * value[batch, 0, column]
    torch.testing.assert_close(smoothed_attention(query, key, value, mask, smoothing), expected)


def test_attention_weights_are_fp32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    expected = smoothed_attention(query, key, value, mask, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(smoothed_attention(query, key, value, mask, 1e-6), expected)


def test_padded_positions_keep_their_order():
    mask = torch.tensor([[False, True, True, False], [False, False, False, True], [False] * 4])
    positions, valid = padded_positions(mask)
    assert valid.tolist() == [[True, True], [True, False], [False, False]]
    assert positions[valid].tolist() == [1, 2, 3]


# Batches of which no patch is kept, while the merger learns


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


# Attention whose mask has a gradient


def attention_inputs(scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 6, 4, generator=generator) for _ in range(3))
    mask = (torch.rand(3, 1, 6, 6, generator=generator) > 0.5).float()
    mask[0], mask[1, 0, 2] = 1, 0
    return query * scale, key * scale, value, mask


@pytest.mark.parametrize("smoothing", [0, 1e-6, 0.1])
@pytest.mark.parametrize("scale", [1, 4])
def test_it_gives_what_inference_gives(smoothing, scale):
    query, key, value, mask = attention_inputs(scale)
    expected = smoothed_attention(query, key, value, mask.bool(), smoothing)
    assert torch.equal(relaxed_attention(query, key, value, mask, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_gradient_of_the_mask_is_what_a_change_of_it_would_do(smoothing):
    query, key, value, mask = attention_inputs()
    mask.requires_grad_()
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    (relaxed_attention(query, key, value, mask, smoothing) * weights).sum().backward()

    def formula(changed: torch.Tensor) -> torch.Tensor:
        logits = (query.double() @ key.double().mT) / 2
        powers = (logits - logits.amax(dim=-1, keepdim=True)).exp() * changed
        total = powers.sum(dim=-1, keepdim=True) + smoothing
        attended = (powers + smoothing / 6) / total @ value.double() * weights
        return attended[mask.expand(-1, 2, -1, -1).sum(dim=-1) > 0].sum()  # not of queries that look at nothing

    step = 1e-6
    for place in [
        (0, 0, 1, 3),
        (0, 0, 5, 0),
        *(mask.sum(dim=-1, keepdim=True) * (1 - mask) > 0).nonzero().tolist()[:5],
    ]:
        change = torch.zeros_like(mask, dtype=torch.double)
        change[tuple(place)] = step
        with torch.no_grad():
            difference = (formula(mask.double() + change) - formula(mask.double() - change)) / (2 * step)
        torch.testing.assert_close(mask.grad[tuple(place)].double(), difference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0, 1e-6])
def test_a_query_that_may_look_at_nothing_has_no_say(smoothing):
    query, key, value, mask = (part.requires_grad_() for part in attention_inputs(scale=8))
    relaxed_attention(query, key, value, mask, smoothing).square().sum().backward()
    assert not mask.grad[1, 0, 2].any()
    assert all(part.grad.isfinite().all() for part in (query, key, value, mask))


def test_the_merger_passes_a_gradient_to_the_whole_decision():
    tokenizer = build_visual_tokenizer(attention_smoothing=0)
    features = tokenizer.get_patch_features(random_pixels(2)).detach()
    keep = (torch.rand(2, NUM_PATCHES, generator=torch.Generator().manual_seed(0)) > 0.5).float().requires_grad_()
    merged = tokenizer.discrete.merger.forward_all(features, keep)
    is_kept = keep > 0
    torch.testing.assert_close(merged[is_kept], tokenizer.discrete.merger(features, is_kept), atol=2e-6, rtol=1e-5)
    merged[is_kept].square().sum().backward()
    assert keep.grad.isfinite().all() and (keep.grad != 0).all(), "of dropped patches, too"
