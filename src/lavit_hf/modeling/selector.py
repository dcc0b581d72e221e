"""Selector: scores every patch, and keeps the informative ones (LaVIT paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_lavit import LavitVisualTokenizerConfig

KEEP = 0
"""Index of "keep" in the selector's scores; 1 is "drop"."""


class LinearInFp32(nn.Linear):
    """Linear layer that computes in fp32 whatever the dtype of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class LayerNormInFp32(nn.LayerNorm):
    """LayerNorm that computes in fp32 whatever the dtype of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LavitSelector(nn.Module):
    """Predicts for every patch the log-probabilities of keeping and of dropping it.

    Half of the channels stay local to the patch, the other half is replaced by its mean over the image, so that a
    patch is judged against the whole picture. Everything is computed in fp32, whatever the dtype of model and
    autocast, so that everyone keeps the same patches.
    """

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        width = config.hidden_size
        self.norm = LayerNormInFp32(width, eps=config.layer_norm_eps)
        self.in_proj = LinearInFp32(width, width)
        self.out_proj_1 = LinearInFp32(width, width // 2)
        self.out_proj_2 = LinearInFp32(width // 2, width // 4)
        self.out_proj_3 = LinearInFp32(width // 4, 2)
        self.act = nn.GELU()

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.

        Returns:
            Log-probabilities `[batch, num_patches, 2]` in fp32, index 0 is "keep".
        """
        with torch.autocast(patch_features.device.type, enabled=False):
            hidden = self.act(self.in_proj(self.norm(patch_features)))
            local, context = hidden.chunk(2, dim=-1)
            hidden = torch.cat([local, context.mean(dim=1, keepdim=True).expand_as(context)], dim=-1)
            hidden = self.act(self.out_proj_1(hidden))
            hidden = self.act(self.out_proj_2(hidden))
            return self.out_proj_3(hidden).log_softmax(dim=-1)


def select_patches(
    log_probs: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Decides which patches to keep.

    Args:
        log_probs: Scores of [`LavitSelector`], `[batch, num_patches, 2]`.
        generator: Samples the decision (as the original does at inference) from this generator, or from one generator
            per image. Without it a patch is kept where keeping is likelier than dropping, which is reproducible.

    Returns:
        Boolean mask `[batch, num_patches]`, true where the patch is kept.

    Raises:
        ValueError: If the scores are not finite, or the number of generators is not the number of images.
    """
    if not torch.isfinite(log_probs).all():
        raise ValueError(
            "The selector's scores are not finite: the pixel values contain NaN or infinity, or the weights are "
            "corrupt."
        )
    if generator is None:
        return log_probs[..., KEEP] > log_probs[..., 1 - KEEP]
    return _uniform(log_probs.shape[:2], generator).to(log_probs.device) < log_probs[..., KEEP].exp()


def _uniform(shape: torch.Size, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"Got {len(generator)} generators for {shape[0]} images; pass one, or one per image.")
    return torch.stack([torch.rand(shape[1:], generator=one, device=one.device).cpu() for one in generator])
