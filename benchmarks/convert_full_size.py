"""How long a checkpoint of the published size takes to be checked and converted, and what memory and disk that needs.

    python benchmarks/convert_full_size.py out/full-size [--kill] [--pickles legacy] [--keep]
    python benchmarks/convert_full_size.py out/small --scale 32 --layers 1    # the same in seconds

Writes a download of the published layout with random weights, 26 GB: the names and shapes of the tests' manifest, the
language model in pickled shards, `visual_weight.bin` over the visual tokenizer, and both pixel decoders. Then runs
`lavit verify` and `lavit convert` on it, each in a process of its own, and prints its minutes, its peak of resident
memory (with pages of mapped files) and the size of the result. With --kill, a first conversion is killed midway. All
of it is removed at the end, unless --keep is given.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from sentencepiece import SentencePieceTrainer

from lavit_hf.training.planning import SDXL_UNET, SDXL_VAE

MANIFEST = Path(__file__).parents[1] / "tests/data/published-7b-manifest.json"
COMMAND = [sys.executable, "-m", "lavit_cli"]
CODES, TEXT_VOCAB, HEAD_WIDTH = 16384, 32000, 128
# Sizes that do not shrink: of ids and codes, patches and their pixels.
_KEPT = (1, 2, 3, 14, 32, 256, 257)
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")
# Stable Diffusion 1.5's, which draws at low resolution.
_LOWRES_UNET = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8}
_PIXEL_DECODERS = {"highres_pixel_decoding": SDXL_UNET, "pixel_decoding": _LOWRES_UNET}
_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Shapes = dict[str, tuple[int, ...]]


def published_shapes(scale: int, layers: int | None) -> dict[str, Shapes]:
    """Names and shapes by file, of a model `scale` times as narrow, with at most so many layers in a row."""
    listed = json.loads(MANIFEST.read_text(encoding="utf-8"))["files"]
    return {
        file: {
            name: tuple(shrink(size, scale) for size in shape)
            for name, shape in entry["tensors"].items()
            if layers is None or not (found := _BLOCK.search(name)) or int(found[1]) < layers
        }
        for file, entry in listed.items()
    }


def shrink(size: int, scale: int) -> int:
    if size == TEXT_VOCAB + 2 + CODES:
        return TEXT_VOCAB // scale + 2 + CODES // scale
    return size if size in _KEPT else size // scale


def write_download(folder: Path, scale: int, layers: int | None, is_zip: bool) -> None:
    """Writes a complete download."""
    torch.manual_seed(0)
    for file, shapes in published_shapes(scale, layers).items():
        if file.startswith("language_model/pytorch_model"):
            write_language_model(folder / "language_model", shapes, scale, is_zip)
        else:
            save(random_tensors(shapes), folder / file, is_zip)
    save(torch.randn(1, 77, shrink(768, scale)).bfloat16(), folder / "pixel_decoding/uncond_embeddings.bin", is_zip)
    for name, unet in _PIXEL_DECODERS.items():
        write_pixel_decoder(folder / name, unet, scale, is_zip)
    (folder / "LICENSE").write_text("Random weights, made by a benchmark: use them as you like.\n", encoding="utf-8")


def write_language_model(folder: Path, shapes: Shapes, scale: int, is_zip: bool) -> None:
    """In shards of at most half its size, with index, configuration and text tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    largest = sum(map(_count, shapes.values())) / 2
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(_count, shards[-1].values())) + _count(shape) > largest:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        save(random_tensors(shard), folder / file, is_zip)
        weight_map.update(dict.fromkeys(shard, file))
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    vocab_size, width = shapes["model.embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    (folder / "tokenizer.model").write_bytes(make_text_tokenizer(TEXT_VOCAB // scale))


def make_text_tokenizer(vocab_size: int) -> bytes:
    """A model of sentencepiece as Llama's, of made-up words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def sentences() -> Iterator[str]:
        for _ in range(max(vocab_size, 1000)):
            yield " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5))

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def write_pixel_decoder(folder: Path, unet: Mapping[str, Any], scale: int, is_zip: bool) -> None:
    """U-Net, VAE and scheduler in their folders, in fp16."""
    narrow = {} if scale == 1 else {"norm_num_groups": 2}
    for name, model_class, config in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, SDXL_VAE)):
        changes = {"block_out_channels": [size // scale for size in config["block_out_channels"]], **narrow}
        if name == "unet":
            changes["cross_attention_dim"] = config["cross_attention_dim"] // scale
        if "projection_class_embeddings_input_dim" in config:
            times = 6 * config["addition_time_embed_dim"]
            changes["projection_class_embeddings_input_dim"] = shrink(1280, scale) + times
        with torch.device("meta"):
            model = model_class.from_config({**config, **changes})
        model.save_config(folder / name)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        tensors = random_tensors(shapes, torch.float16)
        save(tensors, folder / name / "diffusion_pytorch_model.bin", is_zip)
    DDIMScheduler(**_SCHEDULER).save_config(folder / "scheduler")


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=dtype).normal_(std=0.02) for name, shape in shapes.items()}


def save(content: Any, path: Path, is_zip: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def size_of(folder: Path) -> int:
    """Bytes of all files, some of which another process may be writing and renaming."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def run(*arguments: str | Path) -> tuple[float, int]:
    """Runs `lavit` to its end.

    Returns:
        Seconds, and the peak of its resident memory in bytes.
    """
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lavit {arguments[0]} ended with exit status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kill_in_the_middle(arguments: list[str | Path], destination: Path, size: int) -> int:
    """Starts `lavit` and kills it when it has written a third of that size.

    Returns:
        Bytes that it leaves behind.
    """
    process = subprocess.Popen([*COMMAND, *map(str, arguments)])
    pattern = f".{destination.name}.*.partial"
    while process.poll() is None:
        partials = list(destination.parent.glob(pattern))
        if sum(size_of(partial) for partial in partials) > size / 3:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.01)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"lavit {arguments[0]} had ended before it could be killed, with {process.returncode}")
    if destination.exists():
        raise SystemExit(f"{destination} is there, although its conversion was killed")
    return sum(size_of(partial) for partial in destination.parent.glob(pattern))


def report(what: str, seconds: float, memory: int, more: str = "") -> None:
    print(f"{what}: {seconds / 60:.1f} min, {memory / 1e9:.2f} GB of memory at most{more}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new directory to work in; needs twice the size of the download")
    parser.add_argument("--scale", type=int, default=1, choices=(1, 16, 32), help="divides all widths")
    parser.add_argument("--layers", type=int, help="of every network, at most")
    parser.add_argument(
        "--pickles", choices=("zip", "legacy"), default="zip", help="as of torch 1.6 and later, or as before"
    )
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--kill", action="store_true", help="kill a first conversion in the middle")
    parser.add_argument("--keep", action="store_true", help="leave the download and the result there")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True)
    source, destination = given.folder / "original", given.folder / "converted"
    try:
        start = time.perf_counter()
        write_download(source, given.scale, given.layers, is_zip=given.pickles == "zip")
        size = size_of(source)
        print(f"wrote {size / 1e9:.2f} GB in {(time.perf_counter() - start) / 60:.1f} min", flush=True)
        report("lavit verify", *run("verify", source))
        convert: list[str | Path] = ["convert", source, destination, "--max-shard-size", given.max_shard_size]
        if given.scale > 1:
            convert += ["--heads", "vision=4,merger=4,decoder=4"]
        if given.kill:
            left = kill_in_the_middle(convert, destination, size)
            print(
                f"killed in the middle; {left / 1e9:.2f} GB were left, which the next conversion removes", flush=True
            )
        report("lavit convert", *run(*convert), f", {size_of(destination) / 1e9:.2f} GB written")
        if partials := list(given.folder.glob(".*.partial")):
            raise SystemExit(f"{partials[0]} was left behind")
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
