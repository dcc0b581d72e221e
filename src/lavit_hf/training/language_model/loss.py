"""The loss of the language model as a function for `Trainer`, with label smoothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .token_rows import IGNORED


class LanguageModelingLoss:
    """Cross entropy of the next id, with smoothed labels: `compute_loss_func` of a `Trainer`.

    Without smoothing it is the model's own loss. `label_smoothing_factor` of `TrainingArguments` does not do for a
    LaVIT: `Trainer` shifts labels only for the classes that transformers knows as language models, and so has every
    position predict itself. As there, evaluation is smoothed, too.

    ```python
    trainer = Trainer(model, ..., compute_loss_func=LanguageModelingLoss(model, label_smoothing=0.1))
    ```

    Args:
        model: The model that is trained, with adapters or without.
        label_smoothing: Share of the probability that is spread evenly over the whole vocabulary, visual ids included
            (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).

    Raises:
        ValueError: If the share is not from 0 to 1.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must be from 0 to 1, got {label_smoothing}.")
        self.image_token_id: int = model.config.image_token_id
        self.label_smoothing = label_smoothing

    def __call__(
        self, outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Args:
            outputs: What the model returned, with `logits` `[batch, sequence, vocabulary]`.
            labels: Ids to predict, `[batch, sequence]`, unshifted; -100 and image placeholders are ignored.
            num_items_in_batch: What to divide the sum by, as `Trainer` counts it over all that makes an update; by
                default the number of labels that are not ignored.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If there are no labels.
        """
        if labels is None:
            raise ValueError("The batch has no `labels` to compute a loss from; LavitDataCollator makes them.")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        # The last position predicts nothing. Padding the labels is cheaper than copying all other logits.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
        targets = targets.masked_fill(targets == self.image_token_id, IGNORED)
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.label_smoothing,
        )
        if num_items_in_batch is None:
            return loss
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


__all__ = ["LanguageModelingLoss"]
