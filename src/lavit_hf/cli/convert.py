"""`lavit convert`."""

from __future__ import annotations

from pathlib import Path

from ..conversion import convert, convert_to_original, plan


def convert_checkpoint(
    source: Path, destination: Path, dtype: str | None, max_shard_size: str, heads: str | None
) -> None:
    """Original layout to transformers'."""
    convert(source, destination, dtype=dtype, max_shard_size=max_shard_size, heads=heads)
    print(f"Wrote {destination}. Try it: lavit caption IMAGE --model {destination}")


def convert_back(source: Path, destination: Path) -> None:
    """Transformers' layout to the original."""
    convert_to_original(source, destination)
    print(f"Wrote {destination}.")


def show_plan(manifest: Path, heads: str | None) -> None:
    """Prints where every tensor of a manifest goes, in short."""
    print(plan(manifest, heads=heads))
