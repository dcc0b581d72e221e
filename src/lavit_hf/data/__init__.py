"""Data to train and test on: datasets that a user names, and worlds, which are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

_ROWS_AT_A_TIME = 2000


def import_datasets() -> Any:
    """The package `datasets`, which only the training extra installs."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Datasets need the package `datasets`: pip install 'lavit-hf[training]'") from error
    return datasets


def collect_rows(rows: Iterable[Mapping[str, Any]], features: Any) -> Any:
    """Makes a `datasets.Dataset` in memory of rows that are made one by one.

    In chunks, because rows as Python objects take many times the memory of those in a dataset.
    """
    datasets = import_datasets()
    iterator, chunks = iter(rows), []
    while chunk := list(islice(iterator, _ROWS_AT_A_TIME)):
        chunks.append(datasets.Dataset.from_list(chunk, features=features))
    if not chunks:
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return datasets.concatenate_datasets(chunks)
