"""Straight-through Gumbel-softmax decisions of the selector (LaVIT paper, section 3.1)."""

from __future__ import annotations

import torch

from .modeling_lavit_visual_tokenizer import KEEP


@torch.compiler.disable
def gumbel_noise(sample_seeds: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Noise that is a function of every image's own seed: neither batch, process nor global generator matter.

    Drawn on the CPU, so that it is the same on every device.

    Args:
        sample_seeds: Seed of every image, integers `[batch]`.
        num_patches: Patches per image.

    Returns:
        Standard Gumbel noise `[batch, num_patches, 2]` in fp32, on the device of `sample_seeds`.
    """
    generator = torch.Generator()
    noise = torch.empty(len(sample_seeds), num_patches, 2)
    for row, seed in zip(noise, sample_seeds.tolist(), strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    # As in `F.gumbel_softmax`: the negative logarithm of an exponential variable.
    return -noise.log().to(sample_seeds.device)


def straight_through_keep(log_probs: torch.Tensor, noise: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """Decides which patches to keep, with a gradient.

    Args:
        log_probs: Scores of [`LavitSelector`], `[batch, num_patches, 2]`.
        noise: Of [`gumbel_noise`]; without it the likelier decision is taken, as in inference.
        temperature: Of the softmax whose gradient is used.

    Returns:
        `[batch, num_patches]`, exactly 1 where a patch is kept and exactly 0 where not; its gradient is that of the
        softmax.
    """
    scores = log_probs if noise is None else log_probs + noise
    is_kept = (scores[..., KEEP] > scores[..., 1 - KEEP]).to(scores.dtype)
    soft = (scores / temperature).softmax(dim=-1)[..., KEEP]
    return is_kept + (soft - soft.detach())  # the bracket is exactly 0; in another order it would round
