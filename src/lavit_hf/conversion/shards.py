"""Writing safetensors shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..utils.atomic_files import new_file_mode, write_json
from ..utils.progress import Progress
from .atomic import write_error
from .errors import ConversionError


def write_sharded(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
    progress: Progress,
) -> None:
    """Writes tensors as `stem.safetensors`, or as shards with an index, in the format of transformers and diffusers.

    Only the tensors of one shard are held at a time.

    Args:
        folder: Where to write; created if needed.
        stem: Name of the file without its ending.
        sizes: Names of the tensors and their sizes in bytes, in the order of writing.
        read: Returns a tensor by its name.
        max_shard_size: Largest size of a shard, in bytes or as in `"5GB"`.
        progress: Called with the bytes of every written shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = _split(sizes, stem, max_shard_size)
    for filename, tensor_names in split.filename_to_tensors.items():
        write_file(folder / filename, _hold(tensor_names, read))
        progress(sum(sizes[name] for name in tensor_names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index, sort_keys=True)


def check_shard_size(max_shard_size: int | str) -> None:
    """Refuses a size that cannot be understood."""
    try:
        _split({"tensor": 1}, "model", max_shard_size)
    except ValueError as error:
        raise ConversionError(f"The largest size of a shard has to look like 5GB: {error}") from error


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one file of safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise write_error(error, path) from error
    path.chmod(new_file_mode(0o666))  # safetensors makes its files private to their owner


def _split(sizes: Mapping[str, int], stem: str, max_shard_size: int | str) -> StateDictSplit:
    return split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _hold(tensor_names: list[str], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads the tensors of a shard. safetensors takes neither gaps nor two names for one memory."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in tensor_names:
        tensor = read(name).contiguous()
        if (tensor.numel() and tensor.data_ptr() in seen) or tensor.nbytes != tensor.untyped_storage().nbytes():
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors
