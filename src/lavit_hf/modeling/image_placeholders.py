"""Placeholders of continuous images in `input_ids`: where they are, and which of them stay empty.

Two layouts are understood, for all images of a call:
- one placeholder per patch, as processors write. The image's tokens fill the last ones, so that the token before the
  image end is a real one; the others are empty and take no part in attention;
- packed: as many placeholders as the image has tokens.
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
            "tokens. There has to be one placeholder for each token. Did truncation cut an image?"
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
            f"{num_patches} (one per patch). Did truncation cut an image, does a prompt lack one, or are images "
            "passed again that the cache holds already?"
        )
    counts = torch.tensor(num_tokens, device=is_placeholder.device)
    is_empty = torch.zeros_like(is_placeholder)
    is_empty[is_placeholder] = (
        torch.arange(num_patches, device=counts.device) < num_patches - counts[:, None]
    ).flatten()
    return is_empty


def full_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past: int) -> torch.Tensor:
    """The attention mask over `past` cached positions and `input_ids` `[batch, sequence]`, all ones by default.

    Raises:
        ValueError: If the mask is not 2D.
    """
    if attention_mask is None:
        return torch.ones(len(input_ids), past + input_ids.shape[1], dtype=torch.long, device=input_ids.device)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError("The attention mask must be 2D when images have one placeholder per patch.")
    return attention_mask


def pack_rows(
    is_empty: torch.Tensor, attention_mask: torch.Tensor, padding_side: str = "left"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewrites rows so that everything empty or padded is on one side, in the same width.

    Packed rows are ordinary padded ones: sliding windows and caches hold nothing but real tokens.

    Args:
        is_empty: Mask of empty placeholders, `[batch, sequence]`.
        attention_mask: Mask of real tokens, `[batch, sequence]`.
        padding_side: `"left"` to go on writing after the rows; `"right"` to learn from them, as then no position is
            left that sees nothing, for which not every implementation of attention has a gradient.

    Returns:
        Order in which to take the positions, the attention mask of the packed rows, and where each given position
        went, all `[batch, sequence]`. What was left out points to the last real position before it.
    """
    is_real = attention_mask.bool() & ~is_empty
    order = is_real.int().argsort(dim=-1, stable=True, descending=padding_side == "right")
    ranks = is_real.long().cumsum(dim=-1)
    num_padding = is_real.shape[1] - ranks[:, -1:] if padding_side == "left" else 0
    return order, is_real.gather(-1, order).to(attention_mask.dtype), (num_padding + ranks - 1).clamp_min(0)


def trim_rows(
    order: torch.Tensor, packed_mask: torch.Tensor, source: torch.Tensor, padding_side: str = "left"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves out the positions that are padding in all packed rows.

    Args:
        order: See `pack_rows`, as are the others.
        packed_mask: Mask of the packed rows.
        source: Where each given position went.
        padding_side: Of the packed rows.

    Returns:
        The first two narrowed to `[batch, longest row]`, and `source` `[batch, sequence]` shifted by as much.
    """
    longest = max(int(packed_mask.sum(dim=-1).max()), 1)
    if padding_side == "right":
        return order[:, :longest], packed_mask[:, :longest], source
    num_padding = order.shape[1] - longest
    return order[:, num_padding:], packed_mask[:, num_padding:], (source - num_padding).clamp_min(0)
