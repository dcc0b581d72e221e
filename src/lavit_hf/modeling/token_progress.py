"""Progress of `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria


class TokenProgress(StoppingCriteria):
    """Counts tokens on a progress bar and stops nothing; unlike a streamer it works with beams, too."""

    def __init__(self, bar: Any):
        self.bar = bar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


__all__ = ["TokenProgress"]
