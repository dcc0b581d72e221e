"""The licenses that converted weights inherit."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from .source import OriginalCheckpoint

# Of a converted checkpoint; the name of a folder may stand before.
_PATTERNS = [f"*{name}*" for kind in ("licen[cs]e", "notice", "use[-_]policy") for name in (kind, kind.upper())]
_NOTICE = """The weights in this directory were converted from LaVIT weights, which derive from Llama 2
weights. Only their layout was changed.

No license files were found beside the source. Whoever passes these weights on has to add
the LaVIT community license, and the Llama 2 Community License Agreement with its notice
("Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms,
Inc. All Rights Reserved.") and its acceptable use policy. The pixel decoders derive from
Stable Diffusion weights, whose licenses apply to them.
"""


def copy_notices(source: OriginalCheckpoint, folder: Path) -> dict[str, str]:
    """Copies licenses, notices and use policies, or says in a notice which ones are needed.

    Returns:
        Where each of them went.
    """
    copied: dict[str, str] = {}
    for notice in source.notices():
        name = Path(notice).name
        content = (source.root / notice).read_bytes()
        if (folder / name).is_file() and (folder / name).read_bytes() != content:
            name = notice.replace("/", "-")
        shutil.copyfile(source.root / notice, folder / name)
        copied[notice] = name
    if not copied:
        (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    return copied


def copy_notices_of(source: str | os.PathLike[str], folder: Path) -> None:
    """Copies licenses, notices and use policies of a checkpoint to one that was made of it.

    Args:
        source: Directory, or id of a repository.
        folder: The new directory; a file that it has stays.
    """
    root = Path(source if os.path.isdir(source) else snapshot_download(os.fspath(source), allow_patterns=_PATTERNS))
    for path in sorted(root.iterdir()):
        is_notice = any(fnmatch(path.name, pattern) for pattern in _PATTERNS)
        if is_notice and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
