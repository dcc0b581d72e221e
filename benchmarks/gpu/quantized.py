"""Text from a language model with fewer bits: how fast, how large, and how many ids stay."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from full_size import Bench
from report import NotRun, Result
from transformers import BitsAndBytesConfig, TorchAoConfig

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.utils.atomic_files import readable_size

# Other features and codes would be other words, and selectors are never quantized.
KEPT = ["model.visual_tokenizer", "model.multi_modal_projector", "lm_head"]
# Of torchao: weights alone, as a step of one id waits for them to be read.
TORCHAO: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Int8WeightOnlyConfig", {"version": 2}),
    "fp8": ("Float8WeightOnlyConfig", {}),
    "int4": ("Int4WeightOnlyConfig", {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}),
}
LIBRARIES = {**dict.fromkeys(TORCHAO, "torchao"), "nf4": "bitsandbytes"}
NEED_CUDA = ("fp8", "int4", "nf4")


def why_not(way: str, device: torch.device) -> str | None:
    """Why a way to quantize cannot be tried here."""
    if device.type != "cuda" and way in NEED_CUDA:
        return "needs CUDA"
    return None if find_spec(LIBRARIES[way]) else f"{LIBRARIES[way]} is not installed"


def quantization_config(way: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes."""
    if way in TORCHAO:
        from torchao import quantization

        name, options = TORCHAO[way]
        return TorchAoConfig(getattr(quantization, name)(**options), modules_to_not_convert=KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT,
    )


@contextmanager
def saved(bench: Bench) -> Iterator[Path]:
    """The model in a directory, and no longer on the device."""
    bench.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bench.scratch) as name:
        folder = Path(name)
        needed, free = sum(one.nbytes for one in bench.model.parameters()), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"--scratch has {readable_size(free)} free, but {readable_size(needed)} are to be written")
        bench.model.save_pretrained(folder)
        del bench.model
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        yield folder


def load(bench: Bench, folder: Path, way: str | None = None) -> LavitForConditionalGeneration:
    """As users load it."""
    options = {} if way is None else {"quantization_config": quantization_config(way, bench.dtype)}
    placed = {"dtype": bench.dtype, "device_map": {"": bench.device}}
    return LavitForConditionalGeneration.from_pretrained(folder, **placed, **options)


def text_in_fewer_bits(bench: Bench, way: str) -> Iterator[Result | NotRun]:
    """Text of one prompt, beside the same without quantization."""
    what = f"text, batch 1, language model in {way}"
    if reason := why_not(way, bench.device):
        yield NotRun(what, reason)
        return
    prompts, count = bench.prompts(1), bench.size.new_tokens
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}

    def write(model: Any) -> torch.Tensor:
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    @torch.no_grad()
    def likeliest(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(ids).logits[:, prompts.shape[1] - 1 : -1].argmax(-1)

    whole = bench.time(lambda: write(bench.model))
    ids = write(bench.model)
    expected = likeliest(bench.model, ids)
    with saved(bench) as folder:
        held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        model = load(bench, folder, way)
    is_cuda = bench.device.type == "cuda"
    size = torch.cuda.memory_allocated() - held if is_cuda else model.get_memory_footprint()
    timing = bench.time(lambda: write(model))
    # After the same ids: texts that differ once have nothing to compare from there on.
    equal = (likeliest(model, ids) == expected).float().mean().item()
    notes = {"gigabytes": size / 1e9, "equal_ids": equal}
    yield Result(
        what, count / timing.median, "tokens/s", timing, peers={"not quantized": count / whole.median}, notes=notes
    )


QUANTIZED = {f"text_{way}": partial(text_in_fewer_bits, way=way) for way in LIBRARIES}
