"""The files of pixel decoders, which a fine-tuned checkpoint takes over from the one it was made of."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from ..remote_code import names_our_pipeline, write_code
from ..utils.paths import resolve_inside

_INDEX = "model_index.json"
_FOLDERS = ("", "lowres/")
_NAME = re.compile(r"\w+")  # of a folder or a file of code: nothing outside the directory


def copy_pixel_decoders(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> list[str]:
    """Copies the pixel decoders of a checkpoint: with the same codes, another one draws by them, too.

    Args:
        source: A LaVIT directory, or the id of a repository.
        destination: A directory, such as that of a fine-tuned model. A pixel decoder that it has stays.

    Returns:
        The files, relative to either directory; none if there is nothing to copy.

    Raises:
        OSError: If a part of a pixel decoder is missing.
        ValueError: If a part is not in the directory.
    """
    source, target = os.fspath(source), Path(destination)
    root = _fetch(source, [f"{folder}{_INDEX}" for folder in _FOLDERS])
    folders = [
        folder for folder in _FOLDERS if (root / folder / _INDEX).is_file() and not (target / folder / _INDEX).exists()
    ]
    if not folders:
        return []
    patterns = [pattern for folder in folders for pattern in _patterns(root, folder)]
    root = _fetch(source, patterns)
    files: list[Path] = []
    for pattern in patterns:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
        if not found:
            raise OSError(f"{source} has a pixel decoder ({_INDEX}), but no {pattern}.")
        files += found
    names = [path.relative_to(root).as_posix() for path in files]
    for name in names:  # all of them, before anything is written
        resolve_inside(root, name, source)
    written: dict[str, None] = {}  # in this order
    for path, name in zip(files, names, strict=True):
        if path.name == _INDEX and names_our_pipeline(path.parent):
            code = write_code((target / name).parent)  # that of this version, and where the source has none
            written |= dict.fromkeys(file.relative_to(target).as_posix() for file in code)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        written[name] = None
    return list(written)


def _fetch(source: str, patterns: list[str]) -> Path:
    return Path(source if os.path.isdir(source) else snapshot_download(source, allow_patterns=patterns))


def _patterns(root: Path, folder: str) -> list[str]:
    """Files of a pixel decoder; the one that says it is there comes last."""
    index = json.loads((root / folder / _INDEX).read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if not name.startswith("_") and _is_part(value)]
    name = index.get("_class_name")
    is_foreign = isinstance(name, list) and not names_our_pipeline(root / folder)
    modules = name[:1] if is_foreign else []  # of a class whose file stands beside the index
    for part in (*parts, *modules):
        if not _NAME.fullmatch(str(part)):
            raise ValueError(f"{root / folder / _INDEX} names {part!r}, which cannot be a part of a pixel decoder.")
    code = [f"{folder}{module}.py" for module in modules]
    return [*code, *(f"{folder}{part}/*" for part in parts), f"{folder}{_INDEX}"]


def _is_part(value: object) -> bool:
    return isinstance(value, list) and value[:1] != [None]  # a part that a pipeline does without is two times `None`


__all__ = ["copy_pixel_decoders"]
