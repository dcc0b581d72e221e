"""The rows of the table: what is measured, and what it is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from full_size import Bench, Size, build_model, build_pipeline, optimize
from quantized import QUANTIZED, load, saved
from report import NotRun, Result
from steps import lora, qlora, stage_1, stage_3
from timing import Timing, count_flops, seconds

GUIDANCE = 4.0
DYNAMIC = {"cache_implementation": "dynamic"}  # nothing is compiled
STATIC = {"cache_implementation": "static"}  # transformers compiles the steps, on a GPU


# Floors of a step. Every weight of the language model is read once for each id, and so is what is in the cache.


def decoder_bytes(bench: Bench, head_rows: int | None = None) -> int:
    """Bytes of the layers, and of the rows of the head that are computed; all by default."""
    model = bench.model
    layers = sum(weight.nbytes for weight in model.model.language_model.layers.parameters())
    head = model.lm_head.weight
    return layers + head[:head_rows].nbytes


def cache_bytes(bench: Bench, rows: int, positions: float) -> float:
    """Bytes of the keys and values that a step reads."""
    config = bench.size.config.text_config
    head_width = config.hidden_size // config.num_attention_heads
    of_position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width * bench.dtype.itemsize
    return rows * positions * of_position


def _exactly(count: int) -> dict[str, Any]:
    """So many new ids, the likeliest ones."""
    return {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}


# Writing.


def codes(bench: Bench) -> Iterator[Result]:
    """Codes of pictures with guidance, as `generate` writes them by default."""
    model, size, config = bench.model, bench.size, bench.size.config
    drawable = config.visual_tokenizer_config.codebook_size + 1  # rows of the head
    suppressed = list(range(config.eoi_token_id))
    for batch_size in size.drawing_batches:
        text = bench.prompts(batch_size)
        prompts = torch.cat([text, torch.full_like(text[:, :1], config.boi_token_id)], dim=1)
        masks = torch.ones_like(prompts)

        def draw(prompts: torch.Tensor = prompts, masks: torch.Tensor = masks, **options: Any) -> torch.Tensor:
            options = {"generation_mode": "image", "guidance_scale": GUIDANCE, **_exactly(size.codes), **options}
            return model.generate(prompts, attention_mask=masks, **options)

        def two_passes(prompts: torch.Tensor = prompts, masks: torch.Tensor = masks) -> torch.Tensor:
            return bench.plain.generate(
                prompts,
                attention_mask=masks,
                guidance_scale=GUIDANCE,
                negative_prompt_ids=prompts[:, -1:],
                negative_prompt_attention_mask=masks[:, -1:],
                suppress_tokens=suppressed,
                eos_token_id=config.eoi_token_id,
                **_exactly(size.codes),
            )

        total = batch_size * size.codes
        timing = bench.time(draw)
        peers = {"the same, dynamic cache": total / bench.time(lambda draw=draw: draw(**DYNAMIC)).median}
        if batch_size in (1, 4):
            peers["plain Llama, two passes"] = total / bench.time(two_passes).median
        step = decoder_bytes(bench, drawable) + cache_bytes(bench, 2 * batch_size, size.prompt + 1 + size.codes / 2)
        floor = batch_size * bench.floors.bandwidth / step
        result = Result(
            f"guided codes, batch {batch_size}", total / timing.median, "codes/s", timing, floor,
            "copy bandwidth over the bytes of a step", peers,
        )  # fmt: skip
        yield result.require(">= 57 % of the floor", result.share >= 0.57) if batch_size == 1 else result


def text(bench: Bench) -> Iterator[Result]:
    """Text of one prompt, beside a plain Llama of the same weights."""
    prompts, count = bench.prompts(1), bench.size.new_tokens

    def rate(model: Any, **options: Any) -> tuple[float, Timing]:
        timing = bench.time(
            lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **_exactly(count), **options)
        )
        return count / timing.median, timing

    value, timing = rate(bench.model)
    compiled = rate(bench.plain, **STATIC)[0]
    peers = {
        "plain Llama, compiled": compiled,
        "plain Llama, dynamic cache": rate(bench.plain, **DYNAMIC)[0],
        "the same, dynamic cache": rate(bench.model, **DYNAMIC)[0],
    }
    step = decoder_bytes(bench) + cache_bytes(bench, 1, bench.size.prompt + count / 2)
    floor = bench.floors.bandwidth / step
    result = Result(
        "text, batch 1", value, "tokens/s", timing, floor, "copy bandwidth over the bytes of a step", peers
    )
    yield result.require(">= plain compiled Llama", value >= compiled)


def captions(bench: Bench) -> Iterator[Result]:
    """Pictures described in one batch, from pixels to ids."""
    size, config, batch_size = bench.size, bench.size.config, bench.size.reading_batch
    image = [config.boi_token_id, *[config.image_token_id] * size.codes, config.eoi_token_id]
    prompts = torch.tensor([[*image, 5, 6, 7, 8]] * batch_size, device=bench.device)
    pictures = {
        "pixel_values": bench.pixel_values(batch_size),
        "num_image_tokens": torch.full((batch_size,), size.codes, device=bench.device),
    }
    options = _exactly(size.caption_tokens)
    timing = bench.time(
        lambda: bench.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), **pictures, num_beams=1, **options
        )
    )
    # What is left to the language model: the same number of positions, of text.
    short = torch.full_like(prompts, 5)
    plain = bench.time(lambda: bench.plain.generate(short, attention_mask=torch.ones_like(short), **options))
    value = batch_size / timing.median
    peers = {"plain Llama, dynamic cache, without pictures": batch_size / plain.median}
    result = Result(
        f"captions of {size.caption_tokens} tokens, batch {batch_size}", value, "captions/s", timing, peers=peers
    )
    yield result.require(">= 100 captions/s", value >= 100)


# Seeing.


def encode(bench: Bench) -> Iterator[Result]:
    """Pictures to features: vision encoder, selector and merger."""
    tokenizer, sizes = bench.model.visual_tokenizer, bench.size.encoding_batches
    for batch_size in sizes:
        result = _time_encoding(bench, f"pictures read, batch {batch_size}", batch_size)
        is_large = batch_size == max(sizes)
        yield result.require(">= 55 % of the peak", result.share >= 0.55) if is_large else result
    if bench.optimize == "no":
        return
    # Small batches wait for launches, which CUDA graphs record.
    branch = tokenizer.continuous or tokenizer.discrete
    for part in (tokenizer.vision_model, branch.selector, *branch.merger.layers):
        part.compile(mode="reduce-overhead")
    for batch_size in sizes[:-1]:
        yield _time_encoding(bench, f"pictures read, batch {batch_size}, compiled", batch_size)


def _time_encoding(bench: Bench, what: str, batch_size: int) -> Result:
    pixels, tokenizer = bench.pixel_values(batch_size), bench.model.visual_tokenizer

    def embed() -> Any:
        return tokenizer.embed(pixels, num_tokens=bench.size.codes)

    with torch.no_grad():
        timing, flops = bench.time(embed), count_flops(embed)
    return Result(
        what, batch_size / timing.median, "pictures/s", timing, batch_size * bench.floors.flops / flops,
        "measured peak over the products of a picture",
    )  # fmt: skip


# Drawing.


def picture(bench: Bench) -> Iterator[Result]:
    """One prompt to one picture, and the second half alone beside the pipeline of Stable Diffusion XL."""
    size, pipeline = bench.size, bench.pipeline
    peer = bench.time(_plain_diffusers(bench))
    before = bench.time(lambda: _draw(pipeline, size, 1))
    optimize(pipeline, bench.optimize, bench.quantization, height=size.side, width=size.side)
    whole = bench.time(lambda: _draw(pipeline, size, 1))
    drawn = _random_codes(bench, 1)
    pixel_decoder = pipeline.pixel_decoder
    pixels = bench.time(lambda: pixel_decoder(drawn, **_painting(size)))
    floor = _pixel_flops(bench) / bench.floors.flops
    yield Result(
        f"{size.codes} codes to {size.side} x {size.side} pixels", pixels.median, "s", pixels, floor,
        "products of U-Net and VAE over the measured peak", {"plain pipeline of SDXL": peer.median},
    )  # fmt: skip
    result = Result(
        f"prompt to {size.side} x {size.side} picture, {size.codes} codes, {size.steps} steps", whole.median, "s",
        whole, peers={"before optimize()": before.median},
    )  # fmt: skip
    yield result.require("<= 1.5 s", whole.median <= 1.5)


def batch(bench: Bench) -> Iterator[Result]:
    """Many prompts to as many pictures."""
    size, count = bench.size, bench.size.painting_batch
    pipeline = bench.pipeline
    if bench.optimize == "no":  # it finds out by itself how much the VAE has room for
        pipeline.enable_vae_slicing()
    optimize(pipeline, bench.optimize, bench.quantization, batch_size=count, height=size.side, width=size.side)
    timing = bench.time(lambda: _draw(pipeline, size, count))
    value = count / timing.median
    floor = bench.floors.flops / _pixel_flops(bench)
    result = Result(
        f"pictures, batch {count}", value, "pictures/s", timing, floor,
        "measured peak over the products of a picture's pixels",
    )  # fmt: skip
    yield result.require(">= 1.1 pictures/s", value >= 1.1)
    # Codes of one batch are written while the pixels of the other are drawn, if each picture has its own generator.
    total, more = 2 * count, {"batch_size": count}
    own = [torch.Generator().manual_seed(seed) for seed in range(total)]
    overlapping = bench.time(lambda: _draw(pipeline, size, total, generator=own, **more), warm_ups=1)
    in_turn = bench.time(lambda: _draw(pipeline, size, total, **more), warm_ups=1)
    peers = {"one batch after the other": total / in_turn.median}
    yield Result(f"pictures, 2 batches of {count}", total / overlapping.median, "pictures/s", overlapping, peers=peers)


def first_drawing(bench: Bench) -> Iterator[Result]:
    """The first picture of a process, which waits for whatever is compiled."""
    with tempfile.TemporaryDirectory() as cache:
        # Compilers keep what they made; only the first of these processes finds nothing.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        for what in ("first drawing of a process", "first drawing, compiled before in another process"):
            command = bench.child_command("--child", "first_drawing")
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"the process that draws: {child.stderr.strip().splitlines()[-1:]}")
            found = json.loads(child.stdout.splitlines()[-1])
            result = Result(what, found["first"], "s", peers={"a later one": found["later"]}, notes=found)
            yield result.require("<= 8 s over a later one", found["first"] - found["later"] <= 8)


def _time_first_drawing(size: Size, given: Namespace) -> None:
    """Prints the seconds of the first drawing of this process, and of a later one."""
    device = torch.device(given.device)
    start = time.perf_counter()
    pipeline = build_pipeline(size, build_model(size, device, getattr(torch, given.dtype)))
    built = time.perf_counter() - start

    def first() -> None:
        optimize(pipeline, given.optimize, given.quantization, warm_up=False)
        _draw(pipeline, size, 1)

    found = {"built": built, "first": seconds(first, device)}
    found["later"] = min(seconds(lambda: _draw(pipeline, size, 1), device) for _ in range(3))
    print(json.dumps(found))


def _draw(pipeline: Any, size: Size, count: int, **options: Any) -> None:
    drawn = pipeline(
        ["a red cube"] * count,
        num_inference_steps=size.steps,
        guidance_scale=GUIDANCE,
        height=size.side,
        width=size.side,
        min_new_tokens=size.codes,
        max_new_tokens=size.codes,
        **{"generator": torch.Generator().manual_seed(0), **options},
    )
    lengths = [len(codes) for codes in drawn.codes]
    if lengths != [size.codes] * count:
        raise RuntimeError(f"pictures of {lengths} codes were drawn instead of {count} of {size.codes}")


def _painting(size: Size) -> dict[str, Any]:
    return {
        "num_inference_steps": size.steps,
        "guidance_scale": 7.0,
        "height": size.side,
        "width": size.side,
        "generator": torch.Generator().manual_seed(0),
    }


def _random_codes(bench: Bench, count: int) -> list[torch.Tensor]:
    number = bench.size.token_decoder.codebook_size
    return [torch.randint(number, (bench.size.codes,), generator=torch.Generator().manual_seed(0))] * count


def _plain_diffusers(bench: Bench) -> Callable[[], Any]:
    """Stable Diffusion XL as diffusers has it, with the same U-Net, VAE and scheduler, and random conditions."""
    ours, size = bench.pipeline, bench.size
    plain = StableDiffusionXLPipeline(
        vae=ours.vae, unet=ours.unet, scheduler=ours.scheduler,
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    plain.set_progress_bar_config(disable=True)
    shape = (1, size.token_decoder.num_queries, ours.unet.config.cross_attention_dim)
    states = {name: torch.randn(shape).to(bench.device, bench.dtype) for name in ("prompt", "negative_prompt")}
    pooled = torch.randn(1, size.token_decoder.pooled_size).to(bench.device, bench.dtype)
    conditions = {f"{name}_embeds": state for name, state in states.items()}
    conditions |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return lambda: plain(**conditions, **_painting(size))


def _pixel_flops(bench: Bench) -> int:
    """Products of the pixels of one picture: two rows of the U-Net in each step, and the VAE once."""
    size, unet, vae = bench.size, bench.pipeline.unet.config, bench.pipeline.vae.config
    factor = 2 ** (len(vae.block_out_channels) - 1)
    side = size.side // factor
    with torch.device("meta"):
        networks = [UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)]
        latents = torch.empty(2, unet.in_channels, side, side)
        states = torch.empty(2, size.token_decoder.num_queries, unet.cross_attention_dim)
        added = {"text_embeds": torch.empty(2, size.token_decoder.pooled_size), "time_ids": torch.empty(2, 6)}
        with torch.no_grad():
            step = count_flops(lambda: networks[0](latents, 500, states, added_cond_kwargs=added))
            return size.steps * step + count_flops(lambda: networks[1].decode(latents[:1]))


# Loading.


def loading(bench: Bench) -> Iterator[Result]:
    """A checkpoint to the device, beside reading its files for nothing; both from a warm disk cache."""
    with saved(bench) as folder:
        paths = sorted(folder.glob("*.safetensors"))

        def read() -> None:
            buffer = bytearray(2**24)
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        with _anonymous_memory() as peak:
            timing = bench.time(lambda: load(bench, folder), warm_ups=1)
        peer = bench.time(read, warm_ups=1)
        largest = max(path.stat().st_size for path in paths)
        notes = {"gigabytes": sum(path.stat().st_size for path in paths) / 1e9, "shards_in_memory": peak[0] / largest}
        result = Result("loading", timing.median, "s", timing, peers={"reading the files": peer.median}, notes=notes)
        yield result.require("memory of about one shard", peak[0] <= 1.25 * largest)


@contextmanager
def _anonymous_memory() -> Iterator[list[int]]:
    """Watches how much memory this process takes, without pages of files that are mapped.

    Yields:
        A list whose only item is the growth so far, in bytes.
    """
    import psutil  # comes with accelerate

    process = psutil.Process()

    def used() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    start, peak, stop = used(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], used() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[0] = max(peak[0], used() - start)


_ROWS: tuple[Any, ...] = (first_drawing, codes, text, captions, encode, picture, batch, lora, qlora, stage_1, stage_3)
ROWS: dict[str, Callable[[Bench], Iterator[Result | NotRun]]] = {
    **{function.__name__: function for function in _ROWS},
    **QUANTIZED,
    "loading": loading,
}
CHILDREN = {"first_drawing": _time_first_drawing}
