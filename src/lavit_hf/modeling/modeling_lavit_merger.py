"""Merger: folds the dropped patches into the kept ones (LaVIT paper, section 3.1).

Two ways to compute it give the same kept tokens when `attention_smoothing` is 0:
- all positions (`forward_all`), needed for smoothed weights, which leak a little from every position to every other,
  and for the gradient of what is kept;
- kept positions only (`_forward_kept`), with fused attention.

It has a file of its own for transformers' sake: where the file of a model defines attention, transformers assumes that
the implementation of attention cannot be changed, while that of the vision encoder in a visual tokenizer can.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_lavit import LavitVisualTokenizerConfig

# Logits of forbidden keys may exceed those of the allowed ones without limit, and with them the gradient of allowing
# them: e^10 is more than any decision needs, and far from overflow.
_MAX_EXCESS = 10.0


def smoothed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Attention with the smoothed weights of LaVIT, computed in fp32.

    `w = (exp(l - m) * mask + smoothing / N) / (sum(exp(l - m) * mask) + smoothing)` over `N` keys, where `m` is the
    largest of all logits, masked ones too. With smoothing 0 this is a masked softmax (`m` over the allowed logits),
    and a query that may look at nothing gets zeros.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, head_dim]`.
        mask: Boolean, broadcastable to `[batch, 1, queries, keys]`, true where a query may look at a key.
        smoothing: Epsilon of the formula.

    Returns:
        `[batch, heads, queries, head_dim]` in the dtype of `value`.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.matmul(query.float() * query.shape[-1] ** -0.5, key.float().transpose(-1, -2))
        if smoothing == 0:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * mask
        total = weights.sum(dim=-1, keepdim=True)
        if smoothing == 0:
            weights = weights / total.clamp_min(torch.finfo(total.dtype).tiny)
        else:
            weights = (weights + smoothing / key.shape[-2]) / (total + smoothing)
        return torch.matmul(weights.to(value.dtype), value)


def relaxed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """[`smoothed_attention`] with a mask of floating point, exactly 0 or 1, that gets a gradient.

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


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Masked softmax attention in fp32 by `scaled_dot_product_attention`; same arguments as [`smoothed_attention`].

    Every query needs at least one allowed key.
    """
    with torch.autocast(query.device.type, enabled=False):
        output = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return output.to(value.dtype)


def split_heads(hidden: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[batch, positions, width]` -> `[batch, heads, positions, head_dim]`."""
    return hidden.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(hidden: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, positions, head_dim]` -> `[batch, positions, width]`."""
    return hidden.transpose(1, 2).flatten(-2)


def gather_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Picks `positions` `[batch, picked]` out of `hidden` `[batch, num_patches, ...]`."""
    # Of a model that is spread over several devices, what is picked from may be on another one than its mask.
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions.to(hidden.device)]


class LavitSelfAttention(nn.Module):
    """Projections of a self-attention with packed query, key and value weights."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(hidden).chunk(3, dim=-1))
        return query, key, value


class LavitCrossAttention(nn.Module):
    """Projections of a cross-attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def project(self, hidden: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = split_heads(self.q_proj(hidden), self.num_heads)
        key = split_heads(self.k_proj(source), self.num_heads)
        return query, key, split_heads(self.v_proj(source), self.num_heads)


class LavitMLP(nn.Module):
    """Two-layer perceptron of a transformer block."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.act = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class LavitMergerLayer(GradientCheckpointingLayer):
    """Pre-norm block: causal self-attention over kept patches, cross-attention to dropped ones, MLP."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        width, heads = config.hidden_size, config.merger_num_heads
        self.smoothing = config.attention_smoothing
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = LavitSelfAttention(width, heads)
        self.cross_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attn = LavitCrossAttention(width, heads)
        self.mlp_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = LavitMLP(width, config.merger_intermediate_size, config.hidden_act)

    def forward(
        self,
        hidden: torch.Tensor,
        source: torch.Tensor,
        self_mask: torch.Tensor,
        cross_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        has_dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden: State of the patches, `[batch, patches, hidden]`.
            source: Normalized features that cross-attention looks at, `[batch, sources, hidden]`.
            self_mask: `[batch, 1, patches, patches]`, true where a patch may look at another.
            cross_mask: `[batch, 1, 1, sources]`, true at the dropped patches.
            positions: Compute the state of these patches only, `[batch, picked]`; all of them by default.
            has_dropped: `[batch, 1, 1, 1]`, false for images without dropped patches, whose cross-attention is zero.
                If given, attention is fused and without smoothing.

        Returns:
            The new state, `[batch, patches or picked, hidden]`.
        """
        query, key, value = self.self_attn.project(self.self_attn_layer_norm(hidden))
        if positions is not None:
            hidden = gather_positions(hidden, positions)
            query = gather_positions(query.transpose(1, 2), positions).transpose(1, 2)
            self_mask = gather_positions(self_mask[:, 0], positions)[:, None]
        is_fused = has_dropped is not None
        attended = self._attend(query, key, value, self_mask, is_fused)
        hidden = hidden + self.self_attn.out_proj(merge_heads(attended))

        query, key, value = self.cross_attn.project(self.cross_attn_layer_norm(hidden), source)
        attended = self._attend(query, key, value, cross_mask, is_fused)
        if has_dropped is not None:
            attended = attended * has_dropped.to(attended.dtype)
        hidden = hidden + self.cross_attn.out_proj(merge_heads(attended))
        return hidden + self.mlp(self.mlp_layer_norm(hidden))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, is_fused: bool
    ) -> torch.Tensor:
        if is_fused:
            return fused_attention(query, key, value, mask)
        if mask.is_floating_point():
            return relaxed_attention(query, key, value, mask, self.smoothing)
        return smoothed_attention(query, key, value, mask, self.smoothing)


class LavitMerger(nn.Module):
    """Turns the features of all patches into one token for every kept patch."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.smoothing = config.attention_smoothing
        self.norm_features = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([LavitMergerLayer(config) for _ in range(config.merger_num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def output_projections(self) -> list[nn.Linear]:
        """What adds to the hidden states; where these are zero, kept patches only pass through to the norm."""
        layers: Any = self.layers
        return [
            part for layer in layers for part in (layer.self_attn.out_proj, layer.cross_attn.out_proj, layer.mlp.fc2)
        ]

    def forward(self, patch_features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_features: `[batch, num_patches, hidden]`.
            keep_mask: Boolean `[batch, num_patches]`, true where a patch is kept.

        Returns:
            Tokens of the kept patches in raster order, image after image, `[total kept, hidden]`.
        """
        if not keep_mask.any():
            if not self.training:
                return patch_features.new_empty(0, patch_features.shape[-1])
            # Processes that train together wait for one another in every layer, so none may leave layers out.
            return self(patch_features, torch.ones_like(keep_mask))[:0]
        if self.smoothing == 0:
            return self._forward_kept(patch_features, keep_mask)
        positions, is_kept = padded_positions(keep_mask)
        hidden = self.forward_all(patch_features, keep_mask, positions)
        return hidden[is_kept.to(hidden.device)]

    def forward_all(
        self, patch_features: torch.Tensor, keep_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes every patch, `[batch, num_patches, hidden]`; `positions` restricts what the last block returns.

        A `keep_mask` of floating point, exactly 0 or 1, gives the same and gets a gradient.
        """
        is_soft = keep_mask.is_floating_point()
        self_mask, dropped = _self_mask(keep_mask), 1 - keep_mask if is_soft else ~keep_mask
        cross_mask = dropped[:, None, None, :]
        hidden, source = patch_features, self.norm_features(patch_features)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            hidden = layer(hidden, source, self_mask, cross_mask, positions if is_last else None)
        if not len(self.layers) and positions is not None:
            hidden = gather_positions(hidden, positions)
        return self.norm(hidden)

    def _forward_kept(self, patch_features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
        kept, is_kept = padded_positions(keep_mask)
        dropped, is_dropped = padded_positions(~keep_mask)
        hidden = gather_positions(patch_features, kept)
        source = self.norm_features(gather_positions(patch_features, dropped))
        has_dropped = is_dropped.any(dim=-1)[:, None, None, None]
        # Padding comes last, so a causal mask hides it from every kept patch and leaves each query at least itself.
        self_mask = torch.ones(kept.shape[1], kept.shape[1], dtype=torch.bool, device=kept.device).tril()
        cross_mask = is_dropped[:, None, None, :] | ~has_dropped
        for layer in self.layers:
            hidden = layer(hidden, source, self_mask, cross_mask, None, has_dropped)
        return self.norm(hidden[is_kept.to(hidden.device)])


def padded_positions(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices where `mask` `[batch, num_patches]` is true, padded to the longest row.

    Returns:
        Indices `[batch, longest]` (at least one column; padding is arbitrary) and their validity, of the same shape.
    """
    counts = mask.sum(dim=-1)
    longest = max(int(counts.max()), 1)
    # A stable sort puts the true positions first and keeps their order.
    positions = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    return positions, torch.arange(longest, device=mask.device) < counts[:, None]


def _self_mask(keep_mask: torch.Tensor) -> torch.Tensor:
    num_patches = keep_mask.shape[1]
    causal = torch.ones(num_patches, num_patches, dtype=torch.bool, device=keep_mask.device).tril()
    itself = torch.eye(num_patches, dtype=torch.bool, device=keep_mask.device)
    if keep_mask.is_floating_point():
        return torch.where(itself, 1, causal * keep_mask[:, None, :])[:, None]
    return ((causal & keep_mask[:, None, :]) | itself)[:, None]
