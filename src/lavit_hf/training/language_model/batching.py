"""Rows of different lengths as one batch: padded, or several to a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .token_rows import IGNORED, TrainingRow


def pad_rows(
    rows: Sequence[TrainingRow], pad_token_id: int, padding_side: str = "left", multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """One sequence per row, filled up to the longest.

    Args:
        rows: The rows.
        pad_token_id: What to fill with, under a mask.
        padding_side: `"left"` or `"right"`.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[rows, length]` each.
    """
    width = _round_up(max(len(row) for row in rows), multiple)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return padding + values if padding_side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(row.ids, pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, IGNORED) for row in rows]),
    }


def pack_rows(
    rows: Sequence[TrainingRow], pad_token_id: int, max_length: int | None = None, multiple: int | None = None
) -> dict[str, Any]:
    """Several rows per sequence, each with positions of its own.

    From positions that start again, transformers sees where a row begins: its attention masks (and the lengths for
    FlashAttention) keep rows apart. It looks for them only without attention mask and without cache.

    Args:
        rows: Rows, none longer than `max_length`.
        pad_token_id: What to fill sequences up with; the filling is one more row of its own.
        max_length: Length that no sequence exceeds; by default all rows become a single one.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `position_ids` and `labels`, `[sequences, length]` each, and `use_cache=False`.

    Raises:
        ValueError: If a row is longer than `max_length`.
    """
    sequences = _fill_sequences(rows, max_length)
    width = _round_up(max(sum(map(len, sequence)) for sequence in sequences), multiple)
    ids, positions, labels = [], [], []
    for sequence in sequences:
        padding = width - sum(map(len, sequence))
        ids.append([index for row in sequence for index in row.ids] + [pad_token_id] * padding)
        labels.append([label for row in sequence for label in row.labels] + [IGNORED] * padding)
        lengths = [*map(len, sequence), padding]
        positions.append([position for length in lengths for position in range(length)])
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "labels": torch.tensor(labels),
        "use_cache": False,
    }


def _fill_sequences(rows: Sequence[TrainingRow], max_length: int | None) -> list[list[TrainingRow]]:
    """Spreads rows over as few sequences as will do, about equally long ones, so that little is to be filled up."""
    total = sum(map(len, rows))
    limit = total if max_length is None else max_length
    ordered = sorted(rows, key=len, reverse=True)
    for count in range(-(-total // limit), len(rows) + 1):
        sequences: list[list[TrainingRow]] = [[] for _ in range(count)]
        lengths = [0] * count
        for row in ordered:
            shortest = lengths.index(min(lengths))
            sequences[shortest].append(row)
            lengths[shortest] += len(row)
        if max(lengths) <= limit:
            return sequences
    raise ValueError(f"A row of {len(ordered[0])} ids does not fit into sequences of {max_length}.")


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


__all__ = ["pack_rows", "pad_rows"]
