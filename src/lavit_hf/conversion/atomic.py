"""A directory that appears only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.atomic_files import complete_folder, readable_size, why_not_written
from .errors import ConversionError

# Configurations, tokenizer and notices; far more than they need.
_MARGIN = 32 * 2**20


def check_destination(destination: Path) -> None:
    """Refuses a destination that would be overwritten."""
    if destination.is_dir():
        if any(destination.iterdir()):
            raise ConversionError(f"{destination} exists and is not empty; choose another destination or remove it.")
    elif destination.exists() or destination.is_symlink():
        raise ConversionError(f"{destination} exists and is not a directory.")


def check_space(destination: Path, needed: int) -> None:
    """Refuses to start if the disk of `destination` has less than `needed` bytes left."""
    existing = next(folder for folder in (destination, *destination.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed + _MARGIN > free:
        raise ConversionError(
            f"{destination} needs {readable_size(needed + _MARGIN)}, but only {readable_size(free)} are free there."
        )


@contextmanager
def complete_directory(destination: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `destination` that becomes `destination` if the body succeeds.

    Whatever goes wrong in the body, including an interrupt, removes it again.
    """
    check_destination(destination)
    destination = destination.resolve()
    try:
        with complete_folder(destination) as partial:
            yield partial
    except OSError as error:
        if error.errno is None:  # not the system's: something to read is missing, and the message says what
            raise ConversionError(str(error)) from error
        raise write_error(error, error.filename2 or error.filename or destination) from error


def write_error(error: Exception, path: Path | str) -> ConversionError:
    """What to tell the user about a failed write."""
    return ConversionError(why_not_written(error, path))
