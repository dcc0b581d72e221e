"""Who works on what, among processes and machines that share a directory and nothing else.

A claim is a file that exactly one process can create. While it works it touches the file now and then. One that was
killed no longer does: on the same machine the system has released its lock, which is noticed at once, and from another
one the file is watched for the time of a lease. Its successor creates the file with the next number, which again only
one can.

A process that was merely slow may therefore share its work with a successor. Whatever is claimed has to bear that, as
files do that are complete or not there, and the same whoever writes them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic_files import lock_file

_BEATS = 6  # in a lease


class Claims:
    """Claims in a directory.

    Args:
        folder: The directory, which all see.
        lease: After how many seconds without a sign of life a claim is somebody else's to take. File systems over a
            network may show changes a minute late.
    """

    def __init__(self, folder: Path, lease: float = 180.0) -> None:
        self.folder, self.lease = folder, lease
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}  # the last change of a claim, and when it was seen

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the body may do the work of that name; if so, nobody else does meanwhile."""
        taken = self._take(name)
        if taken is None:
            yield False
            return
        path, descriptor = taken
        is_over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, is_over), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            is_over.set()
            beating.join()
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _take(self, name: str) -> tuple[Path, int] | None:
        """The claim and its open file, which is locked; `None` if it is another's."""
        found = [path for path in self.folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]
        last = max(found, key=lambda path: int(path.suffix[1:]), default=None)
        if last is not None and not self._is_abandoned(name, last):
            return None
        path = self.folder / f"{name}.{0 if last is None else int(last.suffix[1:]) + 1}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except (FileExistsError, FileNotFoundError):  # somebody was faster; or all is done, and the directory gone
            return None
        lock_file(descriptor, path)
        os.write(descriptor, socket.gethostname().encode())  # now others may look at the lock
        if last is not None:
            last.unlink(missing_ok=True)
        return path, descriptor

    def _is_abandoned(self, name: str, path: Path) -> bool:
        try:
            change = (path.name, path.stat().st_mtime_ns)
            is_here = path.read_text(encoding="utf-8") == socket.gethostname()
            if is_here and _is_unlocked(path):
                return True
        except FileNotFoundError:
            return False
        seen, since = self._seen.get(name, (None, 0.0))
        if seen != change:
            self._seen[name] = (change, time.monotonic())
            return False
        return time.monotonic() - since > self.lease

    def _beat(self, path: Path, is_over: threading.Event) -> None:
        while not is_over.wait(self.lease / _BEATS):
            try:
                os.utime(path)
            except OSError:  # somebody took it over
                return


def _is_unlocked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return lock_file(descriptor, path)
    finally:
        os.close(descriptor)
