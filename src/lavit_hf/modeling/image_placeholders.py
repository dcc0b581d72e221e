"""Placeholders of continuous images in `input_ids`: where they are, and which of them stay empty.

Two layouts are understood, image by image in the same batch of ids:
- attached: as many placeholders as the image has tokens (the processor had the visual tokenizer at hand);
- light: one placeholder per patch. The image's tokens fill the last ones, so that the token before the image end is a
  real one; the others are empty and take no part in attention.
"""

from __future__ import annotations

import torch


def placeholder_lengths(is_placeholder: torch.Tensor) -> list[int]:
    """Lengths of the runs of placeholders, in order of appearance.

    Args:
        is_placeholder: Boolean mask over the ids, `[batch, sequence]`.
    """
    padded = torch.nn.functional.pad(is_placeholder.int(), (1, 1))
    steps = padded.diff(dim=-1).flatten()
    starts, ends = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    return (ends - starts).tolist()


def split_image_features(is_placeholder: torch.Tensor, image_features: torch.Tensor) -> list[int]:
    """Tokens of every image whose features `[total tokens, hidden]` were handed over, read off the placeholders.

    Raises:
        ValueError: If there are not as many placeholders as tokens.
    """
    lengths = placeholder_lengths(is_placeholder)
    if sum(lengths) != len(image_features):
        raise ValueError(
            f"The prompts hold {sum(lengths)} image placeholders, but image_features has {len(image_features)} "
            "tokens. Pass the two as the processor returned them together. Did truncation cut an image?"
        )
    return lengths


def find_empty_placeholders(
    is_placeholder: torch.Tensor, num_tokens: list[int], num_patches: int
) -> torch.Tensor | None:
    """Tells which placeholders stay empty.

    Args:
        is_placeholder: Boolean mask over the ids, `[batch, sequence]`.
        num_tokens: Tokens of every image, in order of appearance.
        num_patches: Patches per image.

    Returns:
        Boolean mask like `is_placeholder`, or `None` if all placeholders are filled.

    Raises:
        ValueError: If placeholders and images do not fit together.
    """
    lengths = placeholder_lengths(is_placeholder)
    is_flat = len(num_tokens) == 1  # Chunked prefill passes all features of a chunk as one.
    if lengths == [count for count in num_tokens if count > 0] or (is_flat and sum(lengths) == num_tokens[0]):
        return None
    if lengths != [num_patches] * len(num_tokens):
        raise ValueError(
            f"The prompts hold {len(lengths)} images with {lengths} placeholders, but features of {len(num_tokens)} "
            f"images with {num_tokens} tokens were given. Each image needs as many placeholders as it has tokens, or "
            f"{num_patches} (one per patch). Did truncation cut an image, or does a prompt lack one?"
        )
    counts = torch.tensor(num_tokens, device=is_placeholder.device)
    is_empty = torch.zeros_like(is_placeholder)
    is_empty[is_placeholder] = (
        torch.arange(num_patches, device=counts.device) < num_patches - counts[:, None]
    ).flatten()
    return is_empty


def mask_empty_placeholders(attention_mask: torch.Tensor | None, is_empty: torch.Tensor) -> torch.Tensor:
    """Takes empty placeholders out of a mask.

    Args:
        attention_mask: `[batch, past + sequence]`; all ones by default.
        is_empty: `[batch, sequence]`.

    Returns:
        The new mask, `[batch, past + sequence]`.

    Raises:
        ValueError: If the mask is not 2D.
    """
    if attention_mask is None:
        return (~is_empty).long()
    if attention_mask.ndim != 2:
        raise ValueError(
            f"The attention mask must be 2D when images have one placeholder per patch, got {attention_mask.ndim}D."
        )
    past = attention_mask.shape[1] - is_empty.shape[1]
    return attention_mask.masked_fill(torch.nn.functional.pad(is_empty, (past, 0)), 0)


def move_empty_to_left(
    is_empty: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrites rows so that everything empty or padded comes first, in the same width.

    Args:
        is_empty: Boolean mask over the ids, `[batch, sequence]`.
        attention_mask: Mask of real tokens, `[batch, sequence]`; all by default.

    Returns:
        Order in which to take the ids, and the new attention mask, both `[batch, sequence]`.
    """
    is_real = ~is_empty if attention_mask is None else attention_mask.bool() & ~is_empty
    order = is_real.int().argsort(dim=-1, stable=True)
    return order, is_real.gather(-1, order).long()
