"""Directories that an interrupted run fills further when it is started again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_resumable(folder: Path, what: str, settings: Mapping[str, Any], found: Mapping[str, Any] | None) -> None:
    """Makes sure that a run may write to a directory: a new one, or one that was begun with the same settings.

    Args:
        folder: The directory.
        what: What it is to hold, for the error.
        settings: What must not change between two runs.
        found: The settings that it was begun with; `None` if it does not say.

    Raises:
        ValueError: Something else is there, or was made with other settings.
    """
    if found is None:
        # A hidden file is what a run leaves that was killed while it wrote its settings.
        if folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):
            raise ValueError(f"{folder} exists and holds no {what}; choose another directory.")
        return
    names = sorted({name for name in {**found, **settings} if found.get(name) != settings.get(name)})
    if names:
        listed = "; ".join(f"{name}: {found.get(name)} there, {settings.get(name)} now" for name in names)
        raise ValueError(
            f"{folder} was made from other data, by another checkpoint or with other options ({listed}). "
            "Choose another directory, or remove this one to start again."
        )


__all__ = ["check_resumable"]
