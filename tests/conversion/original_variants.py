"""Variants of the reference checkpoint: other dtypes, formats and shards, gaps and additions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADS = "vision=4,merger=4,decoder=4"

ENCODER = "visual_tokenizer/eva_vitg_psz14.bin"
STAGE1 = "visual_tokenizer/tokenizer_encoder.bin"
STAGE2 = "language_model/visual_weight.bin"
LANGUAGE_MODEL = "language_model/pytorch_model.bin"
LOWRES_DECODER = "visual_tokenizer/tokenizer_decoder.bin"
HIGHRES_DECODER = "visual_tokenizer/highres_tokenizer_decoder.bin"

Tensors = dict[str, torch.Tensor]
_LAYOUT = ("visual_tokenizer", "language_model", "pixel_decoding", "highres_pixel_decoding")


def copy_original(original: Path, target: Path) -> Path:
    """A copy that may be changed, without the goldens."""
    for folder in _LAYOUT:
        shutil.copytree(original / folder, target / folder, copy_function=shutil.copyfile)
    return target


def load(path: Path) -> Tensors:
    """Reads a file of weights; a bare tensor gets the name of the file."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {path.stem: content} if isinstance(content, torch.Tensor) else dict(content)


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    """Changes the tensors of a pickle in place."""
    tensors = load(path)
    change(tensors)
    torch.save(tensors, path)


def weight_files(root: Path) -> list[str]:
    """Every file of weights of a layout."""
    found = [path for ending in ("bin", "safetensors") for path in root.rglob(f"*.{ending}")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def to_half(root: Path, dtype: torch.dtype = torch.float16) -> None:
    """Stores matrices in half precision and vectors in full, as the original's own loading code would leave them."""
    for name in weight_files(root):
        path = root / name
        if name.startswith(("visual_tokenizer", "language_model")):
            edit(path, lambda tensors: tensors.update({n: _half(t, dtype) for n, t in tensors.items()}))


def to_safetensors(path: Path, name: str | None = None) -> None:
    """Replaces a pickle by safetensors."""
    save_file(load(path), path.with_name(name or f"{path.stem}.safetensors"))
    path.unlink()


def shard_language_model(root: Path, ending: str = "bin", shards: int = 3, index: bool = True) -> None:
    """Replaces the language model's one file by shards."""
    path = root / LANGUAGE_MODEL
    tensors = load(path)
    path.unlink()
    stem = "pytorch_model" if ending == "bin" else "model"
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        shard = path.with_name(f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}")
        (torch.save if ending == "bin" else save_file)(part, shard)
        weight_map.update(dict.fromkeys(part, shard.name))
    if index:
        content = {"metadata": {}, "weight_map": weight_map}
        path.with_name(f"{stem}.{ending}.index.json").write_text(json.dumps(content))


def assert_same_weights(first: Path, second: Path) -> None:
    """Same files, same names in the same order, same dtypes, same bits."""
    assert weight_files(first) == weight_files(second)
    for name in weight_files(first):
        one, other = load(first / name), load(second / name)
        # safetensors sorts its tensors itself
        assert (list(one) == list(other)) if name.endswith(".bin") else (one.keys() == other.keys()), name
        for key in one:
            assert one[key].dtype == other[key].dtype, (name, key)
            assert one[key].shape == other[key].shape, (name, key)
            assert torch.equal(_bits(one[key]), _bits(other[key])), (name, key)


def _half(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.dim() > 1 else tensor


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
