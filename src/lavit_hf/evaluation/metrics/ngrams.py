"""Counts of word sequences, which caption metrics compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .ptb_tokenizer import tokenize_caption

Tokens = list[str]
MAX_LENGTH = 4  # the caption metrics look at sequences of one to four words


def count_ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Counts all sequences of 1 to 4 words."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, MAX_LENGTH + 1)
        for start in range(len(tokens) - length + 1)
    )


def tokenize_captions(predictions: list[str], references: list[list[str]]) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Tokenizes predictions and their references.

    Raises:
        ValueError: There are no predictions, or one has no reference.
    """
    if not predictions:
        raise ValueError("There is no caption to score.")
    if not all(references):
        raise ValueError(f"Caption {[bool(captions) for captions in references].index(False)} has no reference.")
    return (
        [tokenize_caption(caption) for caption in predictions],
        [[tokenize_caption(caption) for caption in captions] for captions in references],
    )


__all__ = ["MAX_LENGTH", "Tokens", "count_ngrams", "tokenize_captions"]
