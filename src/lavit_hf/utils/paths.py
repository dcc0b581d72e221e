"""Paths that were read from a file: they stay inside a directory, or are refused."""

from __future__ import annotations

import os
from pathlib import Path


def resolve_inside(
    root: str | os.PathLike[str], name: object, source: str, error: type[Exception] = ValueError
) -> Path:
    """Joins a directory and a path that was read from a file.

    Whoever wrote the file must not choose what else of the disk is read or written, be it by `..`, by an absolute path
    or by a link. Links within the directory are fine, as are those of huggingface_hub's cache.

    Args:
        root: The directory.
        name: What the file says; relative to the directory, or absolute and in it.
        source: Who says so, for the error.
        error: What to raise.

    Returns:
        The path, its links not followed: what a cache links to has another name.

    Raises:
        Exception: `error`, if it is no path, or leads out of the directory.
    """
    if not isinstance(name, str) or not Path(name).parts or "\0" in name:
        raise error(f"{source} has {name!r} where the path of a file is needed.")
    path = Path(root) / name
    if is_inside(root, path):
        return path
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise error(
            f"{source} has {name}, which links to {os.path.realpath(path)} outside of it: put a copy there instead."
        )
    raise error(f"{source} names {name}, which is outside of {root}; only files in it are used.")


def is_inside(root: str | os.PathLike[str], path: Path) -> bool:
    """Whether a path, with all links followed, is in a directory or, for a snapshot of a Hub cache, in the cache."""
    folder = Path(root).resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    if target.is_relative_to(folder):
        return True
    # models--owner--name/snapshots/REVISION/file links to models--owner--name/blobs/HASH.
    snapshots = [parent.parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"]
    return any(target.is_relative_to(snapshot.parent / "blobs") for snapshot in snapshots)


def check_links(root: Path, error: type[Exception] = ValueError) -> None:
    """Refuses a directory with links that lead out of it: whoever copies its files would copy those of others.

    Raises:
        Exception: `error`, if there is one.
    """
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(folder, name)
            if path.is_symlink():
                resolve_inside(root, path.relative_to(root).as_posix(), str(root), error)
