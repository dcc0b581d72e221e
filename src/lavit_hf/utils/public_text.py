"""Texts as others may read them: names without directories of this machine, and nothing that breaks a line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[\\/]|file:")
_OF_MACHINE = re.compile(r"[/~\\]|\.\.?[\\/]|[A-Za-z]:[\\/]|file:")
_SEPARATORS = re.compile(r"[\\/]")


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or a directory, not one on the Hub."""
    is_address = "://" in name and not name.startswith("file:")
    return bool(_PATH.match(name)) or (name.count("/") > 1 and not is_address)


def public_name(name: str) -> str:
    """How data or a checkpoint is called where others read it: a path by its last part, a name on the Hub as it is."""
    if not is_path(name) and not os.path.exists(name):
        return name
    last = _SEPARATORS.split(name.rstrip("\\/"))[-1]
    return Path(name).resolve().name if last in ("", ".", "..", "~") else last


def without_paths(value: Any) -> Any:
    """A copy of what a JSON file holds, in which paths are public names, as far as they tell of a machine."""
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(part) for part in value]
    return public_name(value) if isinstance(value, str) and _OF_MACHINE.match(value) else value


def one_line(text: str) -> str:
    """A text as one line: of line breaks, control characters and what no file can hold, only a space stays."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
