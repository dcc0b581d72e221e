"""The licenses that converted weights inherit."""

from __future__ import annotations

import shutil
from pathlib import Path

from .source import OriginalCheckpoint

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
