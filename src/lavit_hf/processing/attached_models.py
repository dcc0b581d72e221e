"""Checks of the visual tokenizer that a processor uses, and loading it from the processor's own checkpoint."""

import os
from typing import Any

import torch

Checkpoint = tuple[str | os.PathLike, dict[str, Any]]


def check_visual_tokenizer(visual_tokenizer: Any, codebook_size: int, image_seq_length: int) -> Any:
    """Returns the visual tokenizer (of a whole model: its part) after checking that it fits the processor.

    Raises:
        TypeError: If it is something else, such as a path.
        ValueError: If its sizes do not fit.
    """
    if visual_tokenizer is None:
        return None
    part = getattr(visual_tokenizer, "visual_tokenizer", visual_tokenizer)
    if not all(callable(getattr(part, name, None)) for name in ("embed", "encode")):
        raise TypeError(
            "`visual_tokenizer` must be a LavitVisualTokenizer or a model that has one, got "
            f"{type(visual_tokenizer).__name__}. From a path, load it with `LavitVisualTokenizer.from_pretrained`."
        )
    config = getattr(part, "config", None)
    for name, expected, what in (
        ("codebook_size", codebook_size, "tokenizer's visual vocabulary"),
        ("num_patches", image_seq_length, "processor's `image_seq_length`"),
    ):
        if config is not None and getattr(config, name, expected) != expected:
            raise ValueError(
                f"The visual tokenizer does not fit this processor: its {name} is {getattr(config, name)}, "
                f"the {what} is {expected}."
            )
    return part


def load_visual_tokenizer(checkpoint: Checkpoint | None) -> Any:
    """The visual tokenizer of a processor's own checkpoint, in fp32: codes are exact.

    Args:
        checkpoint: Directory or Hub id, and what locates it; `None` if the processor was not loaded from one.
    """
    if checkpoint is None:
        raise ValueError(
            "Discrete images need a visual tokenizer: pass `visual_tokenizer=`, or load the processor with "
            "`from_pretrained` from a checkpoint that has one."
        )
    from ..modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer

    path, hub_kwargs = checkpoint
    try:
        return LavitVisualTokenizer.from_pretrained(path, dtype=torch.float32, **hub_kwargs).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Discrete images need a visual tokenizer, and none could be loaded from the processor's own directory, "
            f"{path}: pass `visual_tokenizer=` to the processor. ({error})"
        ) from error
