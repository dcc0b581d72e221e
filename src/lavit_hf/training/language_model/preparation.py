"""What a LaVIT needs before stage 2: where its new parts start, which parameters learn, and by which loss."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from .data_collator import IGNORED


@torch.no_grad()
def init_code_embeddings(model: Any, seed: int = 0) -> None:
    """Starts embeddings and head of the visual ids from the codebook, so that similar codes start with similar rows.

    The rows of a codebook are a map of what its codes mean. Embeddings that start from random rows have to learn that
    map from scratch, code by code. New rows are codebook rows in a random rotation, with the mean and the spread that
    the rows of text have.

    Args:
        model: A `LavitForConditionalGeneration` with a trained visual tokenizer, and visual ids not yet trained.
        seed: Of the rotation.

    Raises:
        ValueError: If the embeddings are narrower than the codebook.
    """
    codebook = F.normalize(model.visual_tokenizer.discrete.quantizer.codebook.weight.float(), dim=-1)
    codebook = codebook - codebook.mean(dim=0)
    offset = model.config.visual_token_offset
    generator = torch.Generator().manual_seed(seed)
    tables = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for rows in tables.values():  # one, if they are tied
        if rows.shape[1] < codebook.shape[1]:
            raise ValueError(f"Embeddings of width {rows.shape[1]} cannot hold a codebook of {codebook.shape[1]}.")
        rotation = nn.init.orthogonal_(torch.empty(rows.shape[1], codebook.shape[1]), generator=generator)
        text, new = rows[:offset].float(), codebook @ rotation.to(codebook.device).T
        new = new * (_spread(text) / _spread(new)) + text.mean(dim=0)
        rows[offset : offset + len(new)] = new.to(rows)


@torch.no_grad()
def init_merger(model: Any) -> None:
    """Starts the merger of the continuous branch as one that passes the features of kept patches on, only normalized.

    The merger of stage 1 has learned to rebuild pictures from codes, and what no code stands for is lost in it: of an
    object in a combination of shape and color that training never showed, it can keep the shape and forget the color.
    From this start the language model reads what the encoder sees of kept patches, and nothing of the dropped ones.
    As all output projections are zero, the merger learns in stage 2 to fold them in, as any residual network that
    starts as the identity; one that is frozen never does.

    Args:
        model: A `LavitForConditionalGeneration` with a visual tokenizer.

    Raises:
        ValueError: If both branches share one merger, so that codes would change, too.
    """
    if model.config.visual_tokenizer_config.share_branches:
        raise ValueError(
            "Codes and features come from one merger (share_branches=True): to start it anew breaks codes."
        )
    merger = model.visual_tokenizer.continuous.merger
    for projection in merger.output_projections():
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    nn.init.ones_(merger.norm.weight)
    nn.init.zeros_(merger.norm.bias)


@torch.no_grad()
def init_projector(model: Any, pixel_values: torch.Tensor, scale: float = 1.0, seed: int = 0) -> None:
    """Starts the projector as a random rotation of the image features, centered and scaled.

    A rotation keeps the proportions of what features tell: where a token is, for example, stays as loud beside its
    color as the visual tokenizer made it. Scale and center are known from the start, so that the projector can stay
    as it is; one that learns with a small language model favors what that learns first, and can lose the rest.

    Args:
        model: A `LavitForConditionalGeneration` with a trained visual tokenizer.
        pixel_values: Some hundred images, `[images, channels, height, width]`.
        scale: Root mean square of the projected features.
        seed: Of the rotation.

    Raises:
        ValueError: If these images have fewer than two tokens.
    """
    features = model.visual_tokenizer.embed(pixel_values.to(model.device, model.dtype)).features.double()
    if len(features) < 2:
        raise ValueError(
            f"These {len(pixel_values)} images have {len(features)} tokens, of which no projection can be made. Pass "
            "more images; or the selector has hardly learned, and drops all patches."
        )
    projector = model.model.multi_modal_projector
    generator = torch.Generator().manual_seed(seed)
    weight = nn.init.orthogonal_(torch.empty(projector.weight.shape, dtype=torch.double), generator=generator)
    weight = weight.to(features.device)
    mean = features.mean(dim=0)
    weight *= scale / ((features - mean) @ weight.T).square().mean().sqrt()
    projector.weight.copy_(weight)
    projector.bias.copy_(-weight @ mean)


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of rows from their mean."""
    return (rows - rows.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


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


__all__ = [
    "LanguageModelingLoss",
    "freeze_for_language_modeling",
    "init_code_embeddings",
    "init_merger",
    "init_projector",
]
