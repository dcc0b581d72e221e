"""What an update of the published high-resolution pixel decoder costs, counted without computing it.

    python benchmarks/pixel_decoder_cost.py [--height 1024] [--width 1024] [--tflops 250]

Networks of the published sizes are built without weights (device "meta"), and torch counts the products of one
sample's forward pass. Training costs three times that (forward, and twice as much backward), four times with gradient
checkpointing; frozen networks only run forward. Memory is that of weights, gradients, AdamW and the running average in
fp32, without activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lavit_hf import LavitTokenDecoder, LavitTokenDecoderConfig, LavitVisualTokenizer, LavitVisualTokenizerConfig
from lavit_hf.training.planning import GIB, SDXL_UNET, SDXL_VAE


def tflops(function: Callable[[], Any]) -> float:
    """Trillions (10^12) of floating-point operations, a product and a sum counted as two."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops() / 1e12


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Prints the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--tflops", type=float, default=250.0, help="what the device reaches: a quarter of an H100's peak"
    )
    arguments = parser.parse_args()
    height, width = arguments.height, arguments.width

    unet = UNet2DConditionModel.from_config(SDXL_UNET)
    vae = AutoencoderKL.from_config(SDXL_VAE)
    decoder = LavitTokenDecoder(LavitTokenDecoderConfig())
    tokenizer = LavitVisualTokenizer(LavitVisualTokenizerConfig(share_branches=True))
    for network in (unet, vae, decoder, tokenizer):
        network.requires_grad_(False)  # nothing is kept for a backward pass
    heads = [decoder.condition_projections, decoder.pooler]
    conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    latents = torch.empty(1, 4, height // 8, width // 8)
    forward = {
        "U-Net": tflops(lambda: unet(latents, 500, torch.empty(1, 256, 2048), added_cond_kwargs=conditions)),
        "VAE encoder": tflops(lambda: vae.encode(torch.empty(1, 3, height, width)).latent_dist.mean),
        "token decoder": tflops(lambda: decoder(torch.zeros(85, dtype=torch.long), [85])),
        "vision encoder": tflops(lambda: tokenizer.get_patch_features(torch.empty(1, 3, 224, 224))),
    }
    sizes = {"U-Net": unet, "VAE": vae, "token decoder": decoder, "visual tokenizer (one branch)": tokenizer}
    for name, module in sizes.items():
        print(f"{name}: {count(module) / 1e6:.0f} M parameters")
    for name, cost in forward.items():
        print(f"{name}: {cost:.2f} TFLOP per image, forward")
    frozen = sum(cost for name, cost in forward.items() if name != "U-Net")
    trained = count(unet) + sum(map(count, heads))
    memory = (20 * trained + 4 * (count(vae) + count(decoder) + count(tokenizer))) / GIB
    for factor, name in ((3, "plain"), (4, "with gradient checkpointing")):
        cost = factor * forward["U-Net"] + frozen
        rate = arguments.tflops / cost
        print(
            f"training, {name}: {cost:.1f} TFLOP per image, {rate:.1f} images/s, {1e6 / rate / 3600:.0f} h per million"
        )
    print(f"memory without activations: {memory:.0f} GiB")


if __name__ == "__main__":
    with torch.device("meta"):
        main()
