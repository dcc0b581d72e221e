"""Wrong words among what a model reads, so that it looks at the image for the right ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .token_rows import IGNORED


def add_text_noise(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    is_image: torch.Tensor,
    kept_ids: Sequence[int],
    probability: float,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Replaces words of learned text after an image by others of the batch; what is to be predicted stays.

    A model that writes "a pink ..." guesses the next word from this one, too, as far as training had words go
    together. If the word that it reads may be wrong, the image tells more. (Word dropout: Bowman et al. 2016,
    https://arxiv.org/abs/1511.06349; replaced words: SwitchOut, https://arxiv.org/abs/1808.07512.) Rows that draw are
    left alone: their text says what to draw.

    Args:
        input_ids: `[rows, length]`.
        labels: `[rows, length]`, `-100` where nothing is learned.
        is_image: Boolean `[rows, length]`, true at ids and placeholders of images.
        kept_ids: Ids that are neither replaced nor replacements, such as the end of text.
        probability: Share of words that are replaced.
        generators: One for each row. Which of its words are replaced depends on this alone, by what also on the batch.

    Returns:
        New input ids.
    """
    is_learned = labels != IGNORED
    draws = (is_learned & is_image).any(dim=-1, keepdim=True)
    is_word = is_learned & ~draws & (is_image.cumsum(dim=-1) > 0)
    is_word &= ~torch.isin(input_ids, torch.tensor(list(kept_ids), dtype=input_ids.dtype))
    words = input_ids[is_word]
    noisy = input_ids.clone()
    for row, generator in enumerate(generators):
        positions = is_word[row].nonzero().squeeze(-1)
        chosen = positions[torch.rand(len(positions), generator=generator) < probability]
        if len(chosen):
            noisy[row, chosen] = words[torch.randint(len(words), (len(chosen),), generator=generator)]
    return noisy


__all__ = ["add_text_noise"]
