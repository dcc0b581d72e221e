"""Quantizer: maps merged tokens to rows of a codebook (LaVIT paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_lavit import LavitVisualTokenizerConfig

# Copies of one codebook may differ by rounding, if one is stored in half precision.
_ROUNDING = 2**-7


class LavitQuantizer(nn.Module):
    """Projects tokens to the codebook's width and picks the nearest row.

    Tokens are l2-normalized, codebook rows are taken as stored.
    """

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.proj_in = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.codebook_dim)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: Merged tokens, `[tokens, hidden]`.

        Returns:
            Codes `[tokens]`, and what they were looked up with, `[tokens, codebook_dim]`, before normalization.
        """
        pre_quantized = self.proj_out(self.proj_in(features).tanh())
        return self.lookup(pre_quantized), pre_quantized

    def lookup(self, pre_quantized: torch.Tensor) -> torch.Tensor:
        """Nearest codebook row of every token, by squared distance in fp32: `[tokens, codebook_dim]` -> `[tokens]`."""
        with torch.autocast(pre_quantized.device.type, enabled=False):
            tokens = F.normalize(pre_quantized.float(), dim=-1)
            # Called, not read: an offloaded codebook is loaded by its forward hook.
            codebook = self.codebook(torch.arange(self.codebook.num_embeddings, device=tokens.device)).float()
            # |t|^2 is the same for every row, so it cannot change which one is nearest.
            return (codebook.square().sum(dim=-1) - 2 * tokens @ codebook.T).argmin(dim=-1)


def same_codebooks(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether codes mean the same by two codebooks, `[codebook_size, codebook_dim]` each, whatever their dtypes."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.detach().float().cpu(), other.detach().float().cpu(), rtol=_ROUNDING, atol=_ROUNDING)
