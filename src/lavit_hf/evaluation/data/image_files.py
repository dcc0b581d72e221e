"""Image files that annotations name."""

from __future__ import annotations

from pathlib import Path


def find_image(folder: Path, *names: str) -> str:
    """The path of the first of these files that exists in a folder.

    Raises:
        ValueError: None does.
    """
    for name in names:
        if (path := folder / name).is_file():
            return str(path)
    raise ValueError(f"{folder} has no {names[0]}; --images takes the folder that the images are in.")
