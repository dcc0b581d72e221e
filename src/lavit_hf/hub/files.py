"""Which files of a checkpoint are published."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import PublishError

WEIGHTS = ".safetensors"
_INDEX = f"{WEIGHTS}.index.json"

# Pickles can run code when they are loaded; what training leaves behind is of use to nobody else.
_PICKLES = ("*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth")
_OF_TRAINING = ("checkpoint-*", "logs", "runs", "unfinished-checkpoint", "events.out.tfevents.*", "log.jsonl")
_OF_TOOLS = (".*", "__pycache__", "*.lock", "*.tmp")


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """The files of a directory, as paths relative to it: those to publish, and those to leave out."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    published = [path.as_posix() for path in paths if not _is_left_out(path)]
    visible = [path.as_posix() for path in paths if not any(fnmatch(part, ".*") for part in path.parts)]
    return published, sorted(set(visible) - set(published))


def _is_left_out(path: Path) -> bool:
    patterns = (*_PICKLES, *_OF_TRAINING, *_OF_TOOLS)
    return any(fnmatch(part, pattern) for part in path.parts for pattern in patterns)


def check_weights(root: Path, files: list[str]) -> None:
    """Makes sure that what is published can be loaded: safetensors that are there, complete and readable.

    Raises:
        PublishError: If weights are missing or corrupt.
    """
    for file in files:
        if file.endswith(_INDEX):
            shards = set(json.loads((root / file).read_text(encoding="utf-8"))["weight_map"].values())
            beside = {str(Path(file).parent / shard) for shard in shards}
            if missing := sorted(beside - set(files)):
                raise PublishError(f"{root / file} lists {missing[0]}, which is not there.")
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
        except SafetensorError as error:
            raise PublishError(f"{root / file} is not a readable safetensors file ({error}).") from error
