"""Reads the files of a checkpoint that may hold anything; whatever is wrong with one is an error that names it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.json_files import read_json_object
from ..utils.safetensors_files import read_headers, read_index
from .errors import PublishError

WEIGHTS = ".safetensors"
_INDEX = f"{WEIGHTS}.index."


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that has to hold an object.

    Raises:
        PublishError: If it cannot be read, or holds something else.
    """
    return read_json_object(path, PublishError)


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
        read_headers(root / file, PublishError)


def _check_shards(root: Path, index: str, files: list[str]) -> None:
    for shard in sorted(read_index(root / index, PublishError)):
        if str(PurePosixPath(index).parent / shard) not in files:
            raise PublishError(f"{root / index} lists {shard}, which is not there.")
