"""What requests to vLLM say about pictures: how they are read, in `mm_processor_kwargs`, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...modeling.modeling_lavit_visual_tokenizer import resolve_budget
from ...processing.image_budgets import BUDGETS
from ...processing.processing_lavit import check_visual_mode

# A third of the patches, about as many as selectors choose on average; as large a share for every picture.
_SHARE = 1 / 3
_CHOICES = (*BUDGETS, "selection")
_SELECTIONS = ("argmax", "expected")


@dataclass(frozen=True)
class PictureOptions:
    """How the pictures of a request are read.

    Attributes:
        num_tokens: How many tokens each becomes; `None` leaves it to the selector.
        selection: How the selector chooses then.
        visual_mode: `"continuous"` or `"discrete"`.
    """

    num_tokens: int | None
    selection: str | None
    visual_mode: str

    def to_dict(self) -> dict[str, Any]:
        """The same as `mm_processor_kwargs`, by which vLLM tells cached pictures apart."""
        values = {"num_image_tokens": self.num_tokens, "selection": self.selection, "visual_mode": self.visual_mode}
        return {name: value for name, value in values.items() if value is not None}


def read_options(
    request: Mapping[str, Any], server: Mapping[str, Any], num_images: int, num_patches: int, visual_mode: str
) -> PictureOptions:
    """Reads the options of a request.

    Args:
        request: Its `mm_processor_kwargs`.
        server: Those that the server was started with. A request that says how many tokens there are overrides all
            that they say of it.
        num_images: Pictures of the request.
        num_patches: Patches of a picture.
        visual_mode: What the checkpoint's processor does by default.

    Returns:
        How its pictures are read.

    Raises:
        ValueError: An option is unknown, or cannot be had.
    """
    known = (*_CHOICES, "visual_mode")
    for given in (request, server):
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"mm_processor_kwargs has no {unknown[0]!r}: LaVIT knows {', '.join(known)}.")
    chosen = next((found for given in (request, server) if (found := _choices(given))), {})
    if len(chosen) > 1:
        raise ValueError(
            f"mm_processor_kwargs: give one of {' and '.join(chosen)}; each says how many tokens there are."
        )
    mode = check_visual_mode(request.get("visual_mode") or server.get("visual_mode") or visual_mode)
    if (selection := chosen.get("selection")) is not None:
        if selection not in _SELECTIONS:
            raise ValueError(f"mm_processor_kwargs: selection is one of {', '.join(_SELECTIONS)}; got {selection!r}.")
        return PictureOptions(None, selection, mode)
    return PictureOptions(_num_tokens(chosen, num_images, num_patches), None, mode)


def _choices(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _CHOICES if given.get(name) is not None}


def _num_tokens(chosen: Mapping[str, Any], num_images: int, num_patches: int) -> int:
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"mm_processor_kwargs: {name} is one number, for all pictures of a request; got {value!r}."
            )
    number = chosen.get("num_image_tokens")
    if (total := chosen.get("max_total_image_tokens")) is not None:
        if total < num_images:
            raise ValueError(f"{num_images} pictures need a token each; max_total_image_tokens is {total}.")
        number = min(int(total) // max(num_images, 1), num_patches)
    rate = None if number is not None else chosen.get("keep_rate", _SHARE)
    return int(resolve_budget(number, rate, 1, num_patches))


def place_pictures(prompt: Sequence[int], tokenizer: Any, image_token: str, count: int) -> list[int]:
    """Replaces the text of placeholders by their id, and tokenizes each stretch of text between them by itself.

    Args:
        prompt: Ids of a prompt that was tokenized as one text.
        tokenizer: LaVIT's.
        image_token: How a placeholder is spelled.
        count: Pictures of the prompt.

    Returns:
        The ids, with one placeholder per picture.

    Raises:
        ValueError: There are not as many placeholders as pictures. A text that spells one cannot be told from them.
    """
    placed: list[int] = []
    for is_text, ids in _runs(prompt, tokenizer):
        parts = tokenizer.decode(ids).split(image_token) if is_text else []
        if len(parts) < 2:
            placed += ids
            continue
        for index, part in enumerate(parts):
            placed += [tokenizer.image_token_id] * (index > 0) + tokenizer.encode(part, add_special_tokens=False)
    found = placed.count(tokenizer.image_token_id)
    if found != count:
        raise ValueError(
            f"The prompt holds {found} {image_token} for {count} pictures. Each has one, which the template writes; "
            "text beside pictures must not spell it."
        )
    return placed


def _runs(prompt: Sequence[int], tokenizer: Any) -> Iterator[tuple[bool, list[int]]]:
    """The prompt in runs of text, and of ids that text does not become."""
    control = {*tokenizer.all_special_ids, tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id}
    codes = range(tokenizer.visual_token_offset, tokenizer.visual_token_offset + tokenizer.codebook_size)
    for is_text, ids in groupby(prompt, lambda index: index not in control and index not in codes):
        yield is_text, list(ids)


__all__ = ["PictureOptions", "place_pictures", "read_options"]
