"""Remembers in a cache which of its positions are empty image placeholders.

With one placeholder per patch only the model knows which of them are empty; it packs rows to the
right and pads them on the left. A caller who goes on from the cache passes the mask of the rows as they were given, so
the cache has to carry the real one.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

_ATTRIBUTE = "_lavit_attention_mask"


def remember_mask(cache: Cache, attention_mask: torch.Tensor) -> None:
    """Stores the mask `[batch, cached positions]` of what `cache` holds."""
    setattr(cache, _ATTRIBUTE, attention_mask.bool())


def forget_mask(cache: Cache | None) -> torch.Tensor | None:
    """Takes the remembered mask out of `cache`."""
    mask = getattr(cache, _ATTRIBUTE, None)
    if mask is not None:
        delattr(cache, _ATTRIBUTE)
    return mask


def apply_remembered_mask(
    attention_mask: torch.Tensor | None, cache: Cache | None, batch_size: int, new_positions: int
) -> torch.Tensor | None:
    """Takes positions that `cache` remembers as empty out of `attention_mask`.

    Args:
        attention_mask: `[batch, past + new]`, all ones if `None`; other than 2D masks are left alone.
        cache: The cache that the call goes on from.
        batch_size: Rows of the call.
        new_positions: Positions that the call adds.

    Returns:
        The mask to use; `attention_mask` itself if nothing is remembered.

    Raises:
        ValueError: If the cache was filled with another number of rows.
    """
    remembered = getattr(cache, _ATTRIBUTE, None)
    is_other_mask = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
    if remembered is None or cache is None or is_other_mask:
        return attention_mask
    if len(remembered) != batch_size:
        raise ValueError(
            f"past_key_values was filled with {len(remembered)} rows, some of whose image placeholders are empty, but "
            f"{batch_size} rows go on from it. To rearrange rows, pass `image_features` and one placeholder for each."
        )
    if attention_mask is None:
        total = int(cache.get_seq_length()) + new_positions
        attention_mask = torch.ones(batch_size, total, dtype=torch.long, device=remembered.device)
    # The cache may have been cropped, or emptied, since.
    width = min(remembered.shape[1], attention_mask.shape[1] - new_positions)
    past = attention_mask[:, :width] * remembered[:, :width].to(attention_mask.dtype)
    return torch.cat([past, attention_mask[:, width:]], dim=1)
