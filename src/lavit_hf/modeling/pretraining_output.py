"""What stage 1 returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class LavitVisualTokenizerForPreTrainingOutput(ModelOutput):
    """What stage 1 makes of a batch of images; tokens of all images follow one another, split by `num_tokens`.

    Args:
        loss: The terms that follow, weighted by the configuration.
        reconstruction_loss: Mean of 1 - cosine between the features of all patches and their reconstruction.
        keep_rate_loss: Squared distance of the kept share from the wanted one.
        commitment_loss: Mean squared distance between tokens and their codes; 0 without quantization.
        cosine: Mean cosine similarity of features and reconstruction, never centered.
        keep_rate: Mean share of kept patches.
        keep_rate_spread: Its standard deviation over the images.
        argmax_keep_rate: What inference would keep.
        live_codes: Different codes in the batch; `None` without quantization, as the next.
        perplexity: Of the codes of the batch.
        codes: Visual codes, `[total kept]`; `None` without quantization.
        num_tokens: Tokens per image, `[batch]`.
        keep_mask: True where a patch was kept, `[batch, num_patches]`.
        selector_log_probs: Log-probabilities of keeping (index 0) and dropping, `[batch, num_patches, 2]`.
        features: The reconstruction, `[batch, num_patches, hidden]`.
        patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    keep_rate_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    cosine: torch.Tensor | None = None
    keep_rate: torch.Tensor | None = None
    keep_rate_spread: torch.Tensor | None = None
    argmax_keep_rate: torch.Tensor | None = None
    live_codes: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    selector_log_probs: torch.Tensor | None = None
    features: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None


__all__ = ["LavitVisualTokenizerForPreTrainingOutput"]
