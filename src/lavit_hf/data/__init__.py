"""Data to train and test on: datasets that a user names, and worlds, which are made."""

from __future__ import annotations

from typing import Any


def import_datasets() -> Any:
    """The package `datasets`, which only the training extra installs."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Datasets need the package `datasets`: pip install 'lavit-hf[training]'") from error
    return datasets
