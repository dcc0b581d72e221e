"""How much faster the shipped encoding is than the dense formula, timed on the same weights in the same run.

    python benchmarks/encode.py [--layers 3] [--batch 4] [--repeats 5]

The baseline computes every position of every merger block with the formula as the original writes it. The
published width (1408, 256 patches, one third of them kept) is used with few layers and random weights: the ratio per
merger block is what counts, not the time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from lavit_hf import LavitVisualTokenizer, LavitVisualTokenizerConfig
from lavit_hf.modeling.modeling_lavit_merger import LavitMerger


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, eps: float):
    """Attention weights written out: `[batch, heads, queries, head_dim]` each, mask of ones and zeros."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    powers = (logits - logits.max(dim=-1, keepdim=True)[0]).exp() * mask
    weights = (powers + eps / logits.shape[-1]) / (powers.sum(dim=-1, keepdim=True) + eps)
    return weights @ value


def dense_merger(merger: LavitMerger, features: torch.Tensor, keep_mask: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference: every block over all positions, kept tokens `[total kept, hidden]` picked at the end."""
    num_patches = features.shape[1]
    keep = keep_mask.float()
    self_mask = (keep[:, None, :] * torch.ones(num_patches, num_patches).tril() + torch.eye(num_patches)).clamp(max=1)
    cross_mask = (1 - keep)[:, None, None, :]
    hidden, source = features, merger.norm_features(features)
    for layer in merger.layers:
        query, key, value = layer.self_attn.project(layer.self_attn_layer_norm(hidden))
        attended = dense_attention(query, key, value, self_mask[:, None], eps)
        hidden = hidden + layer.self_attn.out_proj(attended.transpose(1, 2).flatten(-2))
        query, key, value = layer.cross_attn.project(layer.cross_attn_layer_norm(hidden), source)
        attended = dense_attention(query, key, value, cross_mask, eps)
        hidden = hidden + layer.cross_attn.out_proj(attended.transpose(1, 2).flatten(-2))
        hidden = hidden + layer.mlp(layer.mlp_layer_norm(hidden))
    return merger.norm(hidden)[keep_mask]


def dense_encode(tokenizer: LavitVisualTokenizer, pixels: torch.Tensor, keep_mask: torch.Tensor, eps: float):
    """The whole of `encode` with the dense merger: codes `[total kept]`."""
    branch = tokenizer.discrete
    features = tokenizer.get_patch_features(pixels)
    branch.selector(features)
    return branch.quantizer(dense_merger(branch.merger, features, keep_mask, eps))[0]


def compare(baseline: Callable[[], object], shipped: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best seconds of each, measured in turns so that both see the same machine."""
    best = [float("inf"), float("inf")]
    for run in range(repeats + 1):
        for index, function in enumerate((baseline, shipped)):
            start = time.perf_counter()
            function()
            if run > 0:  # The first round warms up.
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]


def build(layers: int) -> LavitVisualTokenizer:
    config = LavitVisualTokenizerConfig(
        vision_config={"model_type": "blip_2_vision_model", "num_hidden_layers": layers, "initializer_range": 0.02},
        merger_num_layers=layers,
        share_branches=True,
    )
    torch.manual_seed(0)
    return LavitVisualTokenizer(config).eval()


def with_smoothing(tokenizer: LavitVisualTokenizer, smoothing: float) -> LavitVisualTokenizer:
    """The same weights (shared, not copied) with another smoothing."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in tokenizer.parameters()}
    other = copy.deepcopy(tokenizer, memo)
    for module in other.modules():
        if hasattr(module, "smoothing"):
            module.smoothing = smoothing
    return other


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="layers of encoder and of merger")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--kept", type=float, default=1 / 3, help="rate of kept patches")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    tokenizer = build(arguments.layers)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(arguments.batch, 3, 224, 224, generator=generator)
    keep_mask = torch.rand(arguments.batch, 256, generator=generator) < arguments.kept
    features = tokenizer.get_patch_features(pixels)
    print(
        f"width 1408, {arguments.layers} layers each, {arguments.batch} images, "
        f"{int(keep_mask.sum())} of {keep_mask.numel()} patches kept, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    for smoothing in (1e-6, 0.0):
        shipped = with_smoothing(tokenizer, smoothing)
        merger: nn.Module = shipped.discrete.merger
        # The original has no formula for smoothing 0; a vanishing epsilon is the same masked softmax.
        eps = smoothing or 1e-30
        expected = dense_merger(tokenizer.discrete.merger, features, keep_mask, eps)
        error = (merger(features, keep_mask) - expected).abs().max()
        pairs = {
            "merger": (
                lambda eps=eps: dense_merger(tokenizer.discrete.merger, features, keep_mask, eps),
                lambda merger=merger: merger(features, keep_mask),
            ),
            "encode": (
                lambda eps=eps: dense_encode(tokenizer, pixels, keep_mask, eps),
                lambda shipped=shipped: shipped.encode(pixels, keep_mask=keep_mask),
            ),
        }
        for name, (baseline, function) in pairs.items():
            dense, fast = compare(baseline, function, arguments.repeats)
            print(
                f"smoothing {smoothing:<6g} {name}: dense {dense:.3f} s, shipped {fast:.3f} s, "
                f"ratio {dense / fast:.2f}x (max difference of kept tokens {error:.1e})"
            )


if __name__ == "__main__":
    main()
