"""Token merger: the published formula, and the fast path without smoothing."""

import copy

import pytest
import torch

from lavit_hf.modeling.merger import padded_positions, smoothed_attention
from tiny_models import NUM_PATCHES, build_visual_tokenizer, random_pixels


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
