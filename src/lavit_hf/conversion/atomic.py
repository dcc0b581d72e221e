"""A directory that appears only when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConversionError

# Configurations, tokenizer and notices; far more than they need.
_MARGIN = 32 * 2**20
# With less than this left, a write that failed for no stated reason failed for this one.
_FULL = 2**16


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
    partial: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
        yield partial
        partial.chmod(new_file_mode(0o777))  # mkdtemp made it private to its owner
        if destination.is_dir():
            destination.rmdir()
        os.replace(partial, destination)
    except OSError as error:
        if error.errno is None:  # not the system's: something to read is missing, and the message says what
            raise ConversionError(str(error)) from error
        raise write_error(error, error.filename2 or error.filename or destination) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_error(error: Exception, path: Path | str) -> ConversionError:
    """What to tell the user about a failed write; a full disk is the usual reason."""
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    # torch and safetensors wrap the system's error, or swallow it.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or free < _FULL:
        reason = "the disk is full"
    else:
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
    return ConversionError(f"{Path(path).name} could not be written: {reason} ({readable_size(free)} free).")


def readable_size(size: float) -> str:
    """Formats a number of bytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def new_file_mode(mode: int) -> int:
    """The permissions that a new file or directory asking for `mode` gets."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
