"""Files and directories that are there as a whole, or not at all; and what could not be written.

They are written beside their place under a hidden name that ends in `.partial`. A process that is killed leaves that
behind, and the next one that writes the same removes it. A process that still writes is safe from this: it holds a
lock, which ends with the process.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing can be locked this way, so nothing is cleaned up
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
_UMASK = threading.Lock()
# A random name of `tempfile`, or the number of a process, as earlier versions had it.
_RANDOM = r"([a-z0-9_]{8}|\d+)"
_NOT_WRITTEN = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
# What torch says, which does not pass the system's reason on.
_OF_TORCH = re.compile(r"inline_container|PytorchStreamWriter|iostream error|Parent directory .* does not exist")
_OF_SAFETENSORS = re.compile(r"os error (\d+)")


@contextmanager
def complete_file(path: Path, tidies: bool = True) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk.

    Whatever goes wrong in the body, including an interrupt, leaves nothing behind.

    Args:
        path: The file.
        tidies: Whether to look for what a killed process left of it. Among very many files that takes longer than
            writing one, and `remove_partials` may do it once for all of them.
    """
    if tidies:
        remove_partials(path.parent, path.name)
    partial = None
    try:
        while True:
            descriptor, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
            file, partial = os.fdopen(descriptor, "wb"), Path(name)
            if _lock(descriptor, partial, wait=True):
                break
            file.close()
        with file:
            yield file
            file.flush()
            os.fsync(descriptor)
            partial.chmod(new_file_mode(0o666))  # mkstemp made it private to its owner
            os.replace(partial, path)
    except OSError as error:
        # The error of a full disk names no file. An error without a number is a library's and has its own message.
        if error.errno is not None and (error.filename is None or str(error.filename) == str(partial)):
            error.filename = str(path)
        raise
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A directory that becomes `path`, which may be there and empty, if the body succeeds.

    Whatever goes wrong in the body, including an interrupt, removes it again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, path.name)
    with _locked_folder(path.parent, f".{path.name}.", PARTIAL) as partial:
        yield partial
        partial.chmod(new_file_mode(0o777))  # mkdtemp made it private to its owner
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder, which goes with the body; first removes those of this prefix whose processes are gone."""
    place = Path(tempfile.gettempdir())
    _remove_abandoned(path for path in place.glob(f"{prefix}*") if path.is_dir())
    with _locked_folder(place, prefix) as folder:
        yield folder


@contextmanager
def _locked_folder(place: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new folder, locked during the body and removed after it, unless the body has moved it."""
    folder, descriptor = None, None
    try:
        while True:
            folder = Path(tempfile.mkdtemp(suffix, prefix, place))
            descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
            if descriptor is None or _lock(descriptor, folder, wait=True):
                break
            os.close(descriptor)
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left behind in a directory while they wrote `name`, or anything."""
    if not fcntl or not folder.is_dir():
        return
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.{_RANDOM}{re.escape(PARTIAL)}")
    _remove_abandoned(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes files and folders of this user that no living process has locked; links stay."""
    for path in [path for path in paths if fcntl and not path.is_symlink()]:
        try:
            if path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        except OSError:  # gone, or of another user
            continue
        try:
            if _lock(descriptor, path, wait=False):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    """Locks an open file or directory; false if it is another's, or was removed before it was locked."""
    if not fcntl:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
    except OSError:  # taken, or a file system without locks, where nothing is removed
        return wait


def lock_file(descriptor: int, path: Path) -> bool:
    """Locks an open file until it is closed; false if it is another's, is gone, or if nothing can be locked here."""
    return fcntl is not None and _lock(descriptor, path, wait=False)


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
    found, settings = _flat_settings(found), _flat_settings(settings)
    names = sorted({name for name in {**found, **settings} if found.get(name) != settings.get(name)})
    if names:
        listed = "; ".join(f"{name}: {found.get(name)} there, {settings.get(name)} now" for name in names)
        raise ValueError(
            f"{folder} was made from other data, by another checkpoint or with other options ({listed}). "
            "Choose another directory, or remove this one to start again."
        )


def _flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting, so that one that differs can be named: `image_processor.size.height`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        is_nested = isinstance(value, Mapping) and value
        found.update(_flat_settings(value, f"{prefix}{name}.") if is_nested else {f"{prefix}{name}": value})
    return found


def write_json(path: Path, content: Any, sort_keys: bool = False) -> None:
    """Writes a JSON file that is never half there; transformers and diffusers sort the keys of configurations."""
    with complete_file(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode())


@contextmanager
def exit_on_write_errors() -> Iterator[None]:
    """Ends a script with one line instead of a traceback if its disk is full, or must not be written.

    Raises:
        SystemExit: The body raised such an error.
    """
    try:
        yield
    except Exception as error:
        if (failure := write_failure(error)) is None:
            if not isinstance(error.__cause__, Exception) or write_failure(error.__cause__) is None:
                raise
            failure = str(error).rstrip(".")  # the error around it says what could not be written
        raise SystemExit(
            f"error: {failure}. Make room, or choose another directory; where there are checkpoints, "
            "--resume_from_checkpoint latest goes on from the last complete one."
        ) from error


def write_failure(error: Exception, result: object = "The result") -> str | None:
    """What could not be written, and why, whichever library says so; `None` if the error is another one.

    Args:
        error: What was raised.
        result: What to name if the error names no file.
    """
    if (reason := _why_not_written(error)) is None:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None) or result
    return f"{name} could not be written: {reason}"


def _why_not_written(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return error.strerror if error.errno in _NOT_WRITTEN and not _is_of_reading(error) else None
    if type(error).__name__ == "SafetensorError":
        found = _OF_SAFETENSORS.search(str(error))
        return os.strerror(int(found[1])) if found and int(found[1]) in _NOT_WRITTEN else None
    is_of_torch = isinstance(error, RuntimeError) and _OF_TORCH.search(str(error))
    return "the disk is full, or must not be written" if is_of_torch else None


def _is_of_reading(error: OSError) -> bool:
    """Whether an input could not be read, of which the system says the same as of an output."""
    if error.errno == errno.ENOTDIR:  # results go to a directory that was made first
        made = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        return not made & {"mkdir", "makedirs"}
    is_forbidden = error.errno in (errno.EACCES, errno.EPERM) and isinstance(error.filename, str | os.PathLike)
    return is_forbidden and os.path.exists(error.filename) and not os.access(error.filename, os.R_OK)


def readable_size(size: float) -> str:
    """Formats a number of bytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def new_file_mode(mode: int) -> int:
    """The permissions that a new file or directory asking for `mode` gets."""
    with _UMASK:  # it can only be read by setting it
        umask = os.umask(0)
        os.umask(umask)
    return mode & ~umask
