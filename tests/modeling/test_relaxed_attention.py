"""Attention whose mask has a gradient."""

import pytest
import torch

from lavit_hf.modeling.merger import smoothed_attention
from lavit_hf.modeling.relaxed_attention import relaxed_attention
from tiny_models import NUM_PATCHES, build_visual_tokenizer, random_pixels


def inputs(scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 6, 4, generator=generator) for _ in range(3))
    mask = (torch.rand(3, 1, 6, 6, generator=generator) > 0.5).float()
    mask[0], mask[1, 0, 2] = 1, 0
    return query * scale, key * scale, value, mask


@pytest.mark.parametrize("smoothing", [0, 1e-6, 0.1])
@pytest.mark.parametrize("scale", [1, 4])
def test_it_gives_what_inference_gives(smoothing, scale):
    query, key, value, mask = inputs(scale)
    expected = smoothed_attention(query, key, value, mask.bool(), smoothing)
    assert torch.equal(relaxed_attention(query, key, value, mask, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_gradient_of_the_mask_is_what_a_change_of_it_would_do(smoothing):
    query, key, value, mask = inputs()
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
    query, key, value, mask = (part.requires_grad_() for part in inputs(scale=8))
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
