"""The files of pixel decoders, which a fine-tuned checkpoint takes over from the one it was made of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

_INDEX = "model_index.json"
_FOLDERS = ("", "lowres/")


def copy_pixel_decoders(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> list[str]:
    """Copies the pixel decoders of a checkpoint: with the same codes, another one draws by them, too.

    Args:
        source: A LaVIT directory, or the id of a repository.
        destination: A directory, such as that of a fine-tuned model.

    Returns:
        The files, relative to either directory; none if there is no pixel decoder.
    """
    source, target = os.fspath(source), Path(destination)
    root = _fetch(source, [f"{folder}{_INDEX}" for folder in _FOLDERS])
    if root.resolve() == target.resolve():
        return []
    patterns = [pattern for folder in _FOLDERS for pattern in _patterns(root, folder)]
    if not patterns:
        return []
    root = _fetch(source, patterns)
    files = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    names = [path.relative_to(root).as_posix() for path in files]
    for path, name in zip(files, names, strict=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    return names


def _fetch(source: str, patterns: list[str]) -> Path:
    return Path(source if os.path.isdir(source) else snapshot_download(source, allow_patterns=patterns))


def _patterns(root: Path, folder: str) -> list[str]:
    """Files of a pixel decoder; the one that says it is there comes last."""
    path = root / folder / _INDEX
    if not path.is_file():
        return []
    index = json.loads(path.read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if not name.startswith("_") and isinstance(value, list)]
    # A class that comes as code beside the index is named with its file.
    code = [f"{folder}{index['_class_name'][0]}.py"] if isinstance(index["_class_name"], list) else []
    return [*code, *(f"{folder}{part}/*" for part in parts), f"{folder}{_INDEX}"]


__all__ = ["copy_pixel_decoders"]
