"""Temporary folders that do not stay: whatever ends a process, the next one removes what it has left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a killed process leaves its folder to the system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yields a new folder, which goes with the body.

    First removes the folders of this prefix whose processes are gone. A living process has a lock on its folder.

    Args:
        prefix: Of the folder's name; what has it belongs to this function.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_abandoned(folder)
    folder, lock = _make(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(prefix: str) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = _lock(folder)
        except OSError:  # a disk without locks, where nobody else gets one either, and so nobody removes it
            return folder, None
        if lock is not None and folder.exists():
            return folder, lock
        # Another process came between making and locking it, and takes it away.
        if lock is not None:
            os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    try:
        is_ours = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
        lock = _lock(folder) if is_ours and folder.is_dir() else None
    except (OSError, AttributeError):  # it is gone by now, or there are no locks or no owners here
        return
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder for this process; `None` if another one has it."""
    if fcntl is None:
        raise OSError("There are no locks of folders here.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor
