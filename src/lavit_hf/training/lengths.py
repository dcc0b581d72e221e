"""How long rows become, found out without decoding an image: for `train_sampling_strategy="group_by_length"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..processing.processing_lavit import ImageTextProcessor
from .sample_checks import check_prompt, read_messages

_BATCH = 1000


def measure_lengths(dataset: Any, processor: ImageTextProcessor, image_column: str, text_column: str) -> list[int]:
    """Ids of every row as `LavitDataCollator` arranges it, with as many per image as it has patches.

    Args:
        dataset: A `datasets.Dataset` or a sequence of dictionaries.
        processor: The model's processor.
        image_column: Where the images are.
        text_column: Where the text is.

    Returns:
        One length per row. In the discrete form images are shorter than that, by what the selector drops.
    """
    texts, images = [], []
    for row_texts, num_images in _texts_and_images(dataset, image_column, text_column):
        texts.append(row_texts)
        images.append(num_images)
    lengths: list[int] = []
    for start in range(0, len(texts), _BATCH):
        ids = processor.tokenizer(texts[start : start + _BATCH], add_special_tokens=False)["input_ids"]
        lengths.extend(map(len, ids))
    per_image = processor.image_seq_length + 2
    return [length + 1 + count * per_image for length, count in zip(lengths, images, strict=True)]


def _texts_and_images(dataset: Any, image_column: str, text_column: str) -> Iterator[tuple[str, int]]:
    """The text of every row, and its number of images."""
    if not hasattr(dataset, "iter"):
        for row in dataset:
            yield _text(row, text_column), _count(row.get(image_column))
        return
    # As arrow tables, image files stay where they are: on the disk.
    names = [name for name in (text_column, "prompt", "messages") if name in dataset.column_names]
    for table in dataset.with_format("arrow").iter(_BATCH):
        has_images = image_column in table.column_names
        counts = _arrow_counts(table[image_column]) if has_images else [0] * len(table)
        for row, count in zip(table.select(names).to_pylist(), counts, strict=True):
            yield _text(row, text_column), count


def _arrow_counts(column: Any) -> list[int]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.compute  # type: ignore[import-untyped]

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        return [count or 0 for count in pyarrow.compute.list_value_length(column).to_pylist()]
    return [int(is_there) for is_there in column.is_valid().to_pylist()]


def _count(value: Any) -> int:
    if value is None:
        return 0
    return len(value) if isinstance(value, (list, tuple)) else 1


def _text(row: Mapping[str, Any], text_column: str) -> str:
    pieces = [row.get("prompt") or "", row.get(text_column) or ""]
    try:
        messages = read_messages(row) or []
        for piece in pieces:
            check_prompt(piece)
    except ValueError:
        return ""  # a bad sample, which says so when it is read
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        pieces.extend(part.get("text") or "" for part in parts)
    return " ".join(filter(None, pieces))


__all__ = ["measure_lengths"]
