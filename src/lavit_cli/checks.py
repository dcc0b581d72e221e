"""Checks that a command makes at once, before it spends seconds on importing torch.

Whether files hold what they should is for the bodies of the commands to say.
"""

from __future__ import annotations

import errno
import glob
import ipaddress
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_DATA = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar")
_ROOM = 2**16  # bytes; with less, a disk is full
_DEFAULT = "lavit-emoji-small"  # the checkpoint that comes along
_CHECKPOINT = "--model takes a converted checkpoint (see lavit convert --help)"


def find_model(name: str | None) -> str:
    """The checkpoint that `--model` names: a directory, a name on the Hub, or `"lavit-emoji-small"`, as by default."""
    checkpoint = find_checkpoint(name)
    check_model(checkpoint)
    return checkpoint


def find_checkpoint(name: str | None) -> str:
    """Finds a checkpoint without looking into it. `lavit-emoji-small` can be named in any directory."""
    if name is None or (name == _DEFAULT and not Path(name).exists()):
        from lavit_hf import default_checkpoint

        return default_checkpoint()
    return name


def check_compile(compile: bool, beams: int | None) -> None:
    """Refuses `--compile` where it would do nothing."""
    if compile and beams != 1:
        raise ValueError("--compile goes with --beams 1: the search with several beams is not compiled.")


def check_model(model: str) -> None:
    """Refuses a directory that holds neither a LaVIT nor an adapter. Names on the Hub are checked later."""
    path = Path(model)
    if _is_repository(model):
        return
    if not os.path.exists(model):
        raise ValueError(f"{model} does not exist; {_CHECKPOINT}.")
    if not path.is_dir():
        raise ValueError(f"{model} is not a directory; {_CHECKPOINT}.")
    if (path / "visual_tokenizer").is_dir() and (path / "language_model").is_dir():
        raise ValueError(f"{model} is in LaVIT's original layout; convert it first: lavit convert {model} DST")
    is_adapter = (path / "adapter_config.json").is_file()
    if is_adapter and (path / "config.json").is_file():
        raise ValueError(f"{model} holds adapters of LoRA beside a model: keep them in a directory of their own.")
    if is_adapter:
        return
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{model} is not a LaVIT checkpoint: it has no readable config.json.") from error
    if model_type != "lavit":
        raise ValueError(f"{model} is not a LaVIT checkpoint: its config.json is of a {model_type!r} model.")


def check_pictures(sources: Sequence[str]) -> None:
    """Refuses picture files that do not exist. Those on the web are fetched later."""
    for source in sources:
        if source.startswith(("http://", "https://", "data:")) or os.path.isfile(source):
            continue
        if os.path.isdir(source):
            raise ValueError(f"{source} is a directory; name the images in it.")
        raise ValueError(f"{source}: no such image file.")


def parse_regions(boxes: Sequence[str] | None, num_pictures: int) -> list[list[list[float]]] | None:
    """What `--region` says.

    Args:
        boxes: Its values, `LEFT,TOP,RIGHT,BOTTOM` each.
        num_pictures: Pictures of the command.

    Returns:
        The boxes of the only picture, `None` without any. Whether they lie in it, the processor says.

    Raises:
        ValueError: A value is no box, or there is not one picture.
    """
    if not boxes:
        return None
    if num_pictures != 1:
        raise ValueError(f"--region is a box in one picture; there are {num_pictures}.")
    regions = []
    for box in boxes:
        try:
            region = [float(edge) for edge in box.split(",")]
        except ValueError:
            region = []
        if len(region) != 4:
            raise ValueError(f"--region {box}: a box is LEFT,TOP,RIGHT,BOTTOM in pixels, such as 10,20,200,120.")
        regions.append(region)
    return [regions]


def check_picture_output(path: Path) -> None:
    """Refuses a picture file that could not be written, before anything is drawn."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; --output takes the name of a picture file.")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(
            f"{path}: the suffix says the format, and has to be one of {', '.join(PICTURES)}; for example "
            f"{path.stem or 'picture'}.png."
        )
    _check_writable(path, path.parent)


def check_output_directory(path: Path) -> None:
    """Refuses a directory that could not be written to. It may hold an unfinished result."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a directory to write to.")
    _check_writable(path, path)


def check_new_directory(path: Path) -> None:
    """Refuses a directory that could not be created, or is there and not empty."""
    check_output_directory(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not empty; choose another directory or remove it.")


def check_data(name: str) -> None:
    """Refuses a dataset whose path does not exist, and a pattern that no file is named like."""
    if not glob.glob(name, recursive=True) and (_is_path(name) or name.endswith(_DATA) or len(Path(name).parts) > 2):
        raise ValueError(f"{name} does not exist.")


def check_source(path: str | Path | None, option: str, is_file: bool = False, or_repository: bool = False) -> None:
    """Refuses an input file or directory that does not exist.

    Args:
        path: The file or directory; `None` is not given.
        option: What takes it.
        is_file: Which of both it is.
        or_repository: Whether it may be the name of a repository on the Hub.
    """
    if or_repository and _is_repository(str(path)):
        return
    if path is not None and not (os.path.isfile(path) if is_file else os.path.isdir(path)):
        kind = "file" if is_file else "directory"
        state = f"is not a {kind}" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{path} {state}; {option} takes a {kind}.")


def listen(host: str, port: int) -> socket.socket:
    """Takes a port, before anything is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"Cannot listen at {host}, port {port}: {error.strerror or error}.") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether nobody but this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _is_repository(name: str) -> bool:
    return len(Path(name).parts) == 2 and not _is_path(name) and not os.path.exists(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", os.sep))


def _check_writable(path: Path, folder: Path) -> None:
    """Tries to write where `path` goes: to `folder`, or what there is of it."""
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    try:
        # The only sure way to know: root may write everywhere, but not to /proc or a read-only disk.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{path} cannot be written: the disk of {folder} is full.") from error
        raise ValueError(f"{path} cannot be written: {folder} is no directory that you may write to.") from error
