"""What a budget saves: the merger's time against the number of tokens, and what reading an image costs a 7B model.

    python benchmarks/budgets.py [--layers 3] [--batch 4] [--repeats 5]

The merger is measured at the published width (1408, 256 patches) with few blocks and random weights; times are ratios
to that of all tokens, taken in turns in the same run. With smoothing 0 dropped patches are not computed; smoothed
attention, as published weights need it, computes all of them. The table below it is arithmetic: two FLOPs per weight
of the decoder and position, `4 * width * context` per layer for attention, and keys and values of every position in
16 bits.
"""

from __future__ import annotations

import argparse
import time

import torch
from encode import build, with_smoothing

from lavit_hf.modeling.modeling_lavit_visual_tokenizer import select_patches

SHARES = (0.25, 0.5, 1.0)
# Llama 2 7B, the decoder of the published checkpoints.
LAYERS, WIDTH, MLP_WIDTH = 32, 4096, 11008


def measure(layers: int, batch: int, repeats: int) -> dict[float, list[float]]:
    """Ratios of the merger's time at every share of tokens to that of all, by smoothing."""
    tokenizer = build(layers)
    features = tokenizer.get_patch_features(
        torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    )
    masks = [select_patches(tokenizer.discrete.selector(features), keep_rate=share) for share in SHARES]
    ratios = {}
    for smoothing in (0.0, 1e-6):
        merger = with_smoothing(tokenizer, smoothing).discrete.merger
        best = [float("inf")] * len(SHARES)
        for run in range(repeats + 1):
            for index, mask in enumerate(masks):
                start = time.perf_counter()
                merger(features, mask)
                if run > 0:  # The first round warms up.
                    best[index] = min(best[index], time.perf_counter() - start)
        ratios[smoothing] = [seconds / best[-1] for seconds in best]
    return ratios


def reading_cost(tokens: int) -> tuple[float, float]:
    """TFLOP and MB of keys and values for the positions of an image: its tokens, start and end."""
    positions = tokens + 2
    weights = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP_WIDTH)
    contexts = positions * (positions + 1) // 2
    flops = 2 * weights * positions + 4 * LAYERS * WIDTH * contexts
    return flops / 1e12, 2 * LAYERS * WIDTH * positions * 2 / 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="blocks of the merger")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.batch} images")
    for smoothing, ratios in measure(arguments.layers, arguments.batch, arguments.repeats).items():
        found = ", ".join(f"{share:.0%}: {ratio:.2f}" for share, ratio in zip(SHARES, ratios, strict=True))
        print(f"merger with smoothing {smoothing:g}, time at a share of the tokens to that at all: {found}")
    print("\n| Tokens per image | TFLOP to read it | MB of keys and values |\n|--:|--:|--:|")
    for tokens in (16, 32, 64, 100, 128, 256):
        flops, memory = reading_cost(tokens)
        print(f"| {tokens} | {flops:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
