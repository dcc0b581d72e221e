"""Which parts of a LaVIT learn in stage 2."""

from __future__ import annotations

from typing import Any, TypeVar

_Model = TypeVar("_Model")


def freeze_for_language_modeling(model: _Model) -> _Model:
    """Freezes what stage 2 leaves alone: vision encoder, discrete branch, and the selectors.

    Language model, embeddings, head, projection and the merger of the continuous branch go on learning. If the
    branches share their weights, the merger stays frozen too: it would change the codes that are learned.

    Args:
        model: A `LavitForConditionalGeneration`; whatever of its language model is frozen stays so.

    Returns:
        The same model.
    """
    visual_tokenizer: Any = model.visual_tokenizer  # type: ignore[attr-defined]
    visual_tokenizer.requires_grad_(False)
    if visual_tokenizer.continuous is not None:
        visual_tokenizer.continuous.merger.requires_grad_(True)
    return model


__all__ = ["freeze_for_language_modeling"]
