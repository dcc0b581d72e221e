"""Image files that annotations name."""

from __future__ import annotations

import os
from pathlib import Path

from ...utils.paths import resolve_inside


def find_image(folder: Path, row: str, *names: str) -> str:
    """The path of the first of these files that exists in a folder.

    Args:
        folder: Where to look; files elsewhere are not used, whatever their names say.
        row: Who names them, such as `"Question 7"`, for the error.
        names: Relative to the folder.

    Raises:
        ValueError: None does, or a name leads out of the folder.
    """
    for name in names:
        if os.path.isfile(path := resolve_inside(folder, name, row)):
            return str(path)
    raise ValueError(f"{row}: {folder} has no {names[0]:.100}; --images takes the folder that the images are in.")
