"""Steps of training: LoRA, QLoRA, and stages 1 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from full_size import Bench, build_bare_pixel_decoder
from peft import get_peft_model
from quantized import load, saved, why_not
from report import NotRun, Result
from timing import count_flops

from lavit_hf import LavitPreTrainingConfig, LavitVisualTokenizerForPreTraining
from lavit_hf.training import get_lora_config, upcast_trained_weights
from lavit_hf.training.pixel_decoder.loss import PixelDecoderLoss, draw_diffusion, encode_latents
from lavit_hf.training.pixel_decoder.pixel_decoder import select_trained_parameters


def _measure(bench: Bench, what: str, model: Any, loss: Callable[[], torch.Tensor], count: int, unit: str) -> Result:
    """A step of AdamW under autocast, and the products of its forward and backward pass."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=bench.device.type == "cuda")

    def gradients() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            value = loss()
        value.backward()

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    timing = bench.time(step)
    floor = count * bench.floors.flops / count_flops(gradients)
    return Result(
        what, count / timing.median, unit, timing, floor, "measured peak over products, recomputed ones included"
    )


def _adapted(bench: Bench, model: Any, what: str) -> Result:
    """Rows of text, with checkpointing, as examples/finetune_lora.py has it: embeddings and head whole."""
    size = bench.size
    adapted = get_peft_model(model, get_lora_config(model))
    upcast_trained_weights(adapted)
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    shape = (size.lora_rows, size.lora_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.config.boi_token_id, shape, generator=generator).to(bench.device)

    def loss() -> torch.Tensor:
        return adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss

    return _measure(bench, f"step of {what}, {shape[0]} x {shape[1]}", adapted, loss, ids.numel(), "tokens/s")


def lora(bench: Bench) -> Iterator[Result]:
    """A step of LoRA."""
    yield _adapted(bench, bench.model, "LoRA")


def qlora(bench: Bench) -> Iterator[Result | NotRun]:
    """A step of LoRA on a language model in 4 bits."""
    if reason := why_not("nf4", bench.device):
        yield NotRun("step of QLoRA", reason)
        return
    with saved(bench) as folder:
        model = load(bench, folder, "nf4")
    yield _adapted(bench, model, "QLoRA")


def stage_1(bench: Bench) -> Iterator[Result]:
    """A step of the visual tokenizer's training, with its merger and before its codes."""
    size = bench.size
    visual = {**size.config.visual_tokenizer_config.to_dict(), "attention_smoothing": 0, "share_branches": True}
    decoder = {"cross_attention_dims": size.token_decoder.cross_attention_dims, "pooled_size": None}
    config = LavitPreTrainingConfig(
        visual_tokenizer_config=visual, token_decoder_config=decoder, bypass_merger_steps=0
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = LavitVisualTokenizerForPreTraining(config).train()
    pixels = bench.pixel_values(size.stage_1_batch).float()
    seeds = torch.arange(size.stage_1_batch)

    def loss() -> torch.Tensor:
        return model(pixel_values=pixels, sample_seeds=seeds).loss

    what = f"step of stage 1, {size.stage_1_batch} pictures"
    yield _measure(bench, what, model, loss, size.stage_1_batch, "pictures/s")


def stage_3(bench: Bench) -> Iterator[Result]:
    """A step of the pixel decoder's training, from pixels and codes, with checkpointing."""
    size, count = bench.size, bench.size.stage_3_batch
    pipeline = build_bare_pixel_decoder(size, bench.device)
    select_trained_parameters(pipeline)
    network = PixelDecoderLoss(pipeline.unet, pipeline.token_decoder, pipeline.scheduler.config).train()
    network.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, size.side, size.side, generator=generator).to(bench.device) * 2 - 1
    side = size.side // pipeline.vae_scale_factor
    draws = draw_diffusion(torch.arange(count), (pipeline.unet.config.in_channels, side, side), 1000, 0.1)
    codes = torch.randint(size.token_decoder.codebook_size, (count * size.codes,), generator=generator)
    given = {
        "codes": codes.to(bench.device),
        "num_tokens": [size.codes] * count,
        "timesteps": draws.timesteps.to(bench.device),
        "noise": draws.noise.to(bench.device),
        "drop_condition": draws.drop_condition.to(bench.device),
        "time_ids": torch.tensor([[size.side, size.side, 0, 0, size.side, size.side]] * count, device=bench.device),
    }
    posterior = draws.posterior_noise.to(bench.device)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            latents = encode_latents(pipeline.vae, pixels, posterior)
        return network(latents=latents, **given)["loss"]

    what = f"step of stage 3, {count} pictures of {size.side} x {size.side}"
    yield _measure(bench, what, network, loss, count, "pictures/s")
