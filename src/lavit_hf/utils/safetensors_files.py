"""What safetensors say of themselves without being read: names, shapes and dtypes, and which shard has which tensor.

Files of code beside weights hold a copy of this.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from .json_files import read_json_object

_REMEDY = "Download or convert it again."


class TensorHeader(NamedTuple):
    """What is known of a tensor before it is read; the dtype as safetensors call it, such as `"BF16"`."""

    shape: list[int]
    dtype: str


def read_headers(path: str | os.PathLike[str], error: type[Exception] = OSError) -> dict[str, TensorHeader]:
    """Reads the header of a file, which also tells whether the file is complete.

    Raises:
        Exception: `error`, if it is missing, truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
            return {name: TensorHeader(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as reason:
        raise error(f"{path} is not a readable safetensors file ({reason}). {_REMEDY}") from reason


def read_index(path: str | os.PathLike[str], error: type[Exception] = OSError) -> dict[str, list[str]]:
    """Reads the `*.index.json` of a model in several files: which tensors are in which of the files beside it.

    Raises:
        Exception: `error`, if it is no index, or names files elsewhere.
    """
    try:
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it lists none")
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard or shard == ".." or PurePath(shard).name != shard:
                raise ValueError(f"{shard!r} is not the name of a file beside it")
            shards.setdefault(shard, []).append(name)
    except (OSError, ValueError) as reason:
        problem = str(reason).removeprefix(f"{path} ").rstrip(".")
        raise error(f"{path} is no index of weights: {problem}. {_REMEDY}") from reason
    return shards
