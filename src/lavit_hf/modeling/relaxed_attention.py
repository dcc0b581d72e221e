"""Attention whose mask has a gradient, for training the selector through the merger."""

from __future__ import annotations

import torch

# Logits of forbidden keys may exceed those of the allowed ones without limit, and with them the gradient of allowing
# them: e^10 is more than any decision needs, and far from overflow.
_MAX_EXCESS = 10.0


def relaxed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """[`~merger.smoothed_attention`] with a mask of floating point, exactly 0 or 1, that gets a gradient.

    The result is the same; the gradient of the mask says what allowing or forbidding a key would change. A query that
    may look at nothing passes none, because there a first key changes everything at once.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, head_dim]`.
        mask: Broadcastable to `[batch, 1, queries, keys]`, 1 where a query may look at a key.
        smoothing: Epsilon of the formula.

    Returns:
        `[batch, heads, queries, head_dim]` in the dtype of `value`.
    """
    is_allowed = mask > 0
    mask = torch.where(is_allowed.any(dim=-1, keepdim=True), mask, mask.detach())
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.matmul(query.float() * query.shape[-1] ** -0.5, key.float().transpose(-1, -2))
        seen = logits if smoothing else logits.masked_fill(~is_allowed, torch.finfo(logits.dtype).min)
        excess = logits - seen.amax(dim=-1, keepdim=True).detach()  # a shift, which no softmax notices
        weights = excess.clamp(max=_MAX_EXCESS).exp() * mask
        total = weights.sum(dim=-1, keepdim=True)
        if smoothing:
            weights = (weights + smoothing / key.shape[-2]) / (total + smoothing)
        else:
            weights = weights / (total + (total == 0))
        return torch.matmul(weights.to(value.dtype), value)
