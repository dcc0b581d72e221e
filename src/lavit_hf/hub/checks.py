"""Reads the files of a checkpoint that may hold anything; whatever is wrong with one is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import PublishError

WEIGHTS = ".safetensors"
_INDEX = f"{WEIGHTS}.index."


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that has to hold an object.

    Raises:
        PublishError: If it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise PublishError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} holds no JSON object, but a {type(content).__name__}.")
    return content


def is_index(file: str) -> bool:
    """Whether a file tells which shard has which tensor; those of the original tell it of shards that are gone."""
    return _INDEX in file and (not file.startswith("original/") or file.startswith("original/unused."))


def check_weights(root: Path, files: list[str]) -> None:
    """Makes sure that what is published can be loaded: safetensors that are there, complete and readable.

    Raises:
        PublishError: If weights are missing or corrupt.
    """
    for file in filter(is_index, files):
        _check_shards(root, file, files)
    weights = [file for file in files if file.endswith(WEIGHTS)]
    if not any("/" not in file for file in weights):
        raise PublishError(
            f"{root} has no weights in the safetensors format; pickles are not published. Save the model with "
            "`save_pretrained`, or convert the original with `lavit convert`."
        )
    for file in weights:
        try:
            with safe_open(root / file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise PublishError(f"{root / file} is not a readable safetensors file ({error}).") from error


def _check_shards(root: Path, index: str, files: list[str]) -> None:
    weight_map = read_object(root / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise PublishError(f"{root / index} has no weight_map of names of tensors to names of files.")
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard:
            raise PublishError(f"{root / index} lists {shard!r}, which is not the name of a file beside it.")
        if str(PurePosixPath(index).parent / shard) not in files:
            raise PublishError(f"{root / index} lists {shard}, which is not there.")
