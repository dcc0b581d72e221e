"""Which patches become tokens: as the method selects them, or regardless of what they show."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

# By the selector of the checkpoint, by one that learns anew, all of them, or by chance.
DYNAMIC, LEARNED, ALL, RANDOM = "dynamic", "learned", "all patches", "random"
KEEP_RATE = 0.33  # of `random`; about that of `dynamic`
KEEP_RATE_RANGE = (0.05, 1.0)  # of variants that are trained with random budgets
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the patches at which they are measured


def budgets_of(num_patches: int) -> list[int]:
    """Numbers of tokens at which variants are measured."""
    return [round(share * num_patches) for share in BUDGETS]


def decide_blindly(keep_rate: float, patch_features: torch.Tensor) -> torch.Tensor:
    """What a selector returns that keeps patches by chance: log-probabilities of both, `[batch, num_patches, 2]`."""
    # A budget takes the highest of them, which are random patches, too.
    log_odds = keep_rate - torch.rand(patch_features.shape[:2], device=patch_features.device)
    return F.logsigmoid(torch.stack([log_odds, -log_odds], dim=-1))


def blind(visual_tokenizer: nn.Module, selection: str) -> None:
    """Has the selectors of a visual tokenizer decide by chance, unless it is to select as the method does."""
    if selection in (DYNAMIC, LEARNED):
        return
    for branch in (visual_tokenizer.discrete, visual_tokenizer.continuous):
        if branch is not None:
            branch.selector.forward = functools.partial(decide_blindly, 1.0 if selection == ALL else KEEP_RATE)
