"""`lavit merge`."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from ..training.language_model.adapters import merge_adapter
from .loading import without_bars


def run(adapter: str, output: Path, base: str | None, max_shard_size: str) -> None:
    """Merges adapters into their base."""
    logging.set_verbosity_error()
    with without_bars(logging):
        merge_adapter(adapter, output, base=base, max_shard_size=max_shard_size)
    print(f"Wrote {output}. Try it: lavit caption IMAGE --model {output}")
