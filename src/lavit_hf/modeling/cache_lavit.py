"""A cache that knows which of its positions are empty.

With one placeholder per patch only the model knows which of them are empty; it packs rows to the right and pads them
on the left. A caller who goes on from a cache passes the mask of the rows as they were given, so that somebody has to
know the real one: this cache, or the caller, who finds it in the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls the cache, as an argument and in outputs. Callers may pass it by either name in any version.
CACHE_NAME = "cache" if "cache" in {one.name for one in fields(BaseModelOutputWithPast)} else "past_key_values"


def find_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a call, by its name since transformers 5.24 or by that before.

    Raises:
        ValueError: If both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass the cache once: as cache, or by its old name past_key_values.")
    return past_key_values if cache is None else cache


def name_cache(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of a model or an output of transformers."""
    return {CACHE_NAME: cache}


class LavitDynamicCache(DynamicCache):
    """A dynamic cache that knows which of its positions are empty, so that any mask of the rows will do.

    The model returns one after images, unless the caller brought a cache of another class. Who wants to keep a cache
    across calls makes one of these instead of a [`DynamicCache`]; its arguments are the same.

    Attributes:
        attention_mask: False where a position is padding or an empty placeholder, `[batch, positions]`; positions
            behind it are real. `None` until rows with images are in the cache.

    Example:

    ```python
    >>> cache = LavitDynamicCache(config=model.config)
    >>> ids = model.generate(**inputs, cache=cache, max_new_tokens=10)
    >>> ids = torch.cat([ids, next_question_ids], dim=1)
    >>> ids = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=10)
    ```
    """

    attention_mask: torch.Tensor | None = None

    @classmethod
    def take_over(cls, cache: DynamicCache, attention_mask: torch.Tensor) -> LavitDynamicCache:
        """A cache with the layers of `cache`, not with copies of them, and their mask `[batch, positions]`."""
        known = cls()
        known.__dict__.update(vars(cache))
        known.attention_mask = attention_mask.bool()
        return known

    def apply_mask(
        self, attention_mask: torch.Tensor | None, batch_size: int, new_positions: int, repeats: int = 1
    ) -> torch.Tensor | None:
        """Takes positions that the cache knows as empty out of `attention_mask`.

        Args:
            attention_mask: `[batch, cached + new]`, all ones if `None`; other than 2D masks are left alone.
            batch_size: Rows of the call.
            new_positions: Positions that the call adds.
            repeats: Rows in the cache for each of the call, next to each other: `generate` repeats rows for beams.

        Returns:
            The mask to use; `attention_mask` itself if nothing is empty.

        Raises:
            ValueError: If the cache was filled with another number of rows, or the mask leaves out what it holds.
        """
        known = self.attention_mask
        is_other_mask = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
        if known is None or is_other_mask or (attention_mask is None and known.all()):
            return attention_mask
        if len(known) != batch_size * repeats:
            raise ValueError(
                f"The cache was filled with {len(known)} rows, some of whose image placeholders are empty, but "
                f"{batch_size * repeats} rows go on from it. Rearrange its rows first, by `batch_select_indices` or "
                "`batch_repeat_interleave`."
            )
        known = known[::repeats]
        if attention_mask is None:
            total = int(self.get_seq_length()) + new_positions
            attention_mask = torch.ones(batch_size, total, dtype=torch.long, device=known.device)
        if attention_mask.shape[1] < known.shape[1]:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} positions, but the cache holds {known.shape[1]} "
                "already. The mask covers both cached and new positions."
            )
        past = attention_mask[:, : known.shape[1]] * known.to(attention_mask)
        return torch.cat([past, attention_mask[:, known.shape[1] :]], dim=1)

    def reset(self) -> None:
        super().reset()
        self.attention_mask = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, : int(self.get_seq_length())]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.repeat_interleave(repeats, dim=0)

    def _select_rows(self, indices: torch.Tensor) -> None:
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[indices.to(self.attention_mask.device)]


def remember_mask(cache: Cache | None, attention_mask: torch.Tensor, is_new: bool) -> Cache | None:
    """Puts the mask `[batch, positions]` of what `cache` holds into it, if it is a cache that can know it.

    Args:
        cache: The cache.
        attention_mask: Its mask.
        is_new: Whether the caller does not have the cache yet, so that another can take its place.

    Returns:
        The cache, or the one in its place.
    """
    if isinstance(cache, LavitDynamicCache):
        cache.attention_mask = attention_mask.bool()
    elif is_new and type(cache) is DynamicCache:
        return LavitDynamicCache.take_over(cache, attention_mask)
    return cache


@dataclass
class LavitGenerateDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """Output of `generate`.

    Args:
        attention_mask: Mask to go on from the cache with `sequences`, of the same size. Rows are packed to
            the right in the cache, without empty placeholders. `None` if no mask was given, and none is needed.
    """

    attention_mask: torch.Tensor | None = None


@dataclass
class LavitGenerateBeamDecoderOnlyOutput(GenerateBeamDecoderOnlyOutput):
    """Output of `generate` with beams; see [`LavitGenerateDecoderOnlyOutput`]."""

    attention_mask: torch.Tensor | None = None


OUTPUTS: dict[type, Any] = {
    GenerateDecoderOnlyOutput: LavitGenerateDecoderOnlyOutput,
    GenerateBeamDecoderOnlyOutput: LavitGenerateBeamDecoderOnlyOutput,
}
