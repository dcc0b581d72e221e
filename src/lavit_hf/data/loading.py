"""Finds the dataset that a user names, be it on the disk or on the Hub."""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.json_files import read_json_object
from ..utils.paths import resolve_inside
from . import import_datasets
from .worlds import WORLDS

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
}
_DAMAGE = (EOFError, tarfile.TarError, zlib.error)  # what archives raise that break off
_SAVED = ("state.json", "dataset_dict.json")


class NamedDataset(NamedTuple):
    """A `Dataset` or `IterableDataset`, and the directory that the paths in it must not leave.

    It is where the data are, of a dataset on the Hub the cache, and `None` for data that hold no paths.
    """

    dataset: Any
    root: Path | None


def load_data(
    name: str,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    num_scenes: int = 10_000,
    num_shards: int = 1,
) -> NamedDataset:
    """Loads a dataset, or makes it.

    Args:
        name: A world, which is made: `"scenes"`, `"emoji"` or `"emoji-small"` (`"./emoji"` is a folder); a directory
            saved by `save_to_disk`, a directory of images (with `metadata.csv` or `metadata.jsonl`) or of data files,
            a single JSON, JSON lines, CSV, TSV, Parquet, Arrow or tar (WebDataset) file or several by a pattern
            (`"shards/*.tar"`), or the name of a dataset on the Hub.
        split: Which split.
        config: Which configuration of a dataset on the Hub.
        revision: Which revision of a dataset on the Hub.
        streaming: Reads when rows are asked for, without storing the dataset first.
        num_scenes: How many scenes to make.
        num_shards: With `streaming`, how many shards a dataset has at most that was made or saved by `save_to_disk`;
            of others, every file is one.

    Returns:
        The dataset.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: The system does not let it be read.
        ValueError: There is no such file, or no such split, or it is damaged (of streamed data, as far as it is read
            here).
    """
    datasets = import_datasets()
    if name in WORLDS:
        made = WORLDS[name].make_dataset(split, num_scenes)
        return NamedDataset(_to_stream(made, num_shards) if streaming else made, None)
    path = Path(name)
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{name} is empty.")
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED):
        dataset = load_saved(path)
        if isinstance(dataset, dict):
            if split not in dataset:
                raise _missing_split(path, split, dataset)
            dataset = dataset[split]
        return NamedDataset(_to_stream(dataset, num_shards) if streaming else dataset, path)
    if path.is_dir():
        _check_readable(path)
        return NamedDataset(_load_dataset(datasets, name, str(path), split=split, streaming=streaming), path)
    if path.is_file() or glob.has_magic(name):
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{name}: cannot read a dataset from this file; known are {', '.join(_BUILDERS)}.")
        builder, options = _BUILDERS[path.suffix]
        files, root = ([str(path)], path.parent) if path.is_file() else _match_files(name)
        # A single file has a single split, which may have any name.
        found = _load_dataset(
            datasets, name, builder, data_files={split: files}, split=split, streaming=streaming, **options
        )
        return NamedDataset(found, root)
    if path.suffix in _BUILDERS or name.startswith((".", "/", "~")) or len(path.parts) > 2:
        raise ValueError(f"{name} does not exist.")
    return NamedDataset(
        _load_dataset(datasets, name, name, config, split=split, revision=revision, streaming=streaming),
        Path(HF_HUB_CACHE),
    )


def _to_stream(dataset: Any, num_shards: int) -> Any:
    return dataset.to_iterable_dataset(num_shards=max(min(num_shards, len(dataset)), 1))


def _match_files(pattern: str) -> tuple[list[str], Path]:
    """The files of a pattern in order, and the directory that it starts in."""
    files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    if not files:
        raise ValueError(f"No file is named like {pattern}.")
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    return files, Path(*parts)


def _load_dataset(datasets: Any, name: str, *args: Any, **options: Any) -> Any:
    """Calls `datasets.load_dataset`; its errors name the dataset."""
    try:
        with named_errors(name):
            return datasets.load_dataset(*args, **options)
    except ValueError as error:
        splits = _split_names(datasets, *args, **options)
        if splits and re.fullmatch(r"\w+", options["split"]) and options["split"] not in splits:
            raise _missing_split(name, options["split"], splits) from error
        raise


@contextmanager
def named_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Has what `datasets` raises about damaged data name the dataset. Errors of the system and of the Hub stay."""
    import datasets  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except (ValueError, OSError, *_DAMAGE, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if isinstance(cause, OSError) and (cause.errno is not None or not os.path.exists(name)):
            raise cause from None
        raise ValueError(f"{name} cannot be read: {cause or error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is damaged: {error!r}.") from error


def _check_readable(folder: str | os.PathLike[str]) -> None:
    """Refuses what `datasets` leaves out without a word: folders that must not be listed, and links to nothing."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__")):  # left out on purpose
                continue
            if entry.is_dir(follow_symlinks=False):
                _check_readable(entry)
            elif entry.is_symlink():
                os.stat(entry)


def _split_names(datasets: Any, *args: Any, split: str, streaming: bool, **options: Any) -> list[str]:
    """Lists the splits; none if that cannot be found out."""
    try:
        return datasets.get_dataset_split_names(*args, **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError):
        return []


def _missing_split(name: str | Path, split: str, splits: Iterable[str]) -> ValueError:
    names = list(splits)
    return ValueError(
        f"{name} has no split {split!r}; it has {', '.join(names)}. Name one that there is, as in --split {names[0]}."
    )


def load_saved(path: Path) -> Any:
    """Calls `datasets.load_from_disk`, after a check: it would also load files outside of the directory.

    Raises:
        ValueError: The directory names files outside of it, or cannot be read.
    """
    import datasets  # type: ignore[import-untyped]

    splits = [path]
    if (file := path / "dataset_dict.json").is_file():
        splits = [resolve_inside(path, name, str(file)) for name in _read_names(file, "splits")]
    for folder in splits:
        file = folder / "state.json"
        for entry in _read_names(file, "_data_files"):
            resolve_inside(folder, entry.get("filename") if isinstance(entry, dict) else entry, str(file))
    with named_errors(path):
        return datasets.load_from_disk(str(path))


def _read_names(file: Path, key: str) -> list[Any]:
    content = read_json_object(file, ValueError)
    try:
        return list(content[key])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: it lists no {key} ({error!r}).") from error
