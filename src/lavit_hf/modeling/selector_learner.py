"""How the selector learns to decide, and how it is kept from decisions that only noise makes look healthy."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_lavit_pretraining import LavitPreTrainingConfig
from .distributed import gather_rows, take_from_first_process
from .gumbel import gumbel_noise, straight_through_keep
from .selector import KEEP, LavitSelector, select_patches

_DECAY = 0.9  # of the threshold's moving average: a few batches, because the selector moves


class LavitSelectorLearner(nn.Module):
    """Takes the decisions of training, and follows what calibration needs.

    Under Gumbel noise a selector that gives every patch the probability rho meets the wanted rate, while its argmax
    keeps nothing. So the noise ends when the selector has learned: its bias is shifted by `threshold`, after which the
    argmax keeps the wanted share, those patches that the selector likes best.
    """

    threshold: torch.Tensor

    def __init__(self, config: LavitPreTrainingConfig):
        super().__init__()
        self.config = config
        self.register_buffer("threshold", torch.zeros(()))  # log-odds that the wanted share of patches exceeds

    def forward(
        self, selector: LavitSelector, patch_features: torch.Tensor, sample_seeds: torch.Tensor | None, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            selector: Scores the patches; its bias is shifted once, when it has learned.
            patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.
            sample_seeds: Seeds of the images' noise, `[batch]`.
            step: Forwards in training mode so far.

        Returns:
            Log-probabilities `[batch, num_patches, 2]`, and 1 where a patch is kept, else 0, with a gradient,
            `[batch, num_patches]`.

        Raises:
            ValueError: If training lacks seeds, or features are not finite.
        """
        is_learning = self.config.selector_steps is None or step < self.config.selector_steps
        if self.training and step == self.config.selector_steps and step > 0:
            self._shift(selector)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_learning):
            log_probs = selector(patch_features)
        select_patches(log_probs.detach())  # complains about NaN
        noise = None
        if self.training and is_learning:
            self._follow_threshold(log_probs, step)
            noise = _noise(sample_seeds, log_probs)
        return log_probs, straight_through_keep(log_probs, noise, self.config.gumbel_temperature)

    @torch.no_grad()
    def _follow_threshold(self, log_probs: torch.Tensor, step: int) -> None:
        log_odds = gather_rows((log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).reshape(-1, 1)).flatten()
        rank = min(max(round((1 - self.config.keep_rate) * len(log_odds)), 1), len(log_odds))
        self.threshold.lerp_(log_odds.kthvalue(rank).values, 1.0 if step == 0 else 1 - _DECAY)

    @torch.no_grad()
    def _shift(self, selector: LavitSelector) -> None:
        take_from_first_process(self.threshold)
        selector.out_proj_3.bias[KEEP] -= self.threshold


def _noise(sample_seeds: torch.Tensor | None, log_probs: torch.Tensor) -> torch.Tensor:
    if sample_seeds is None or sample_seeds.shape != log_probs.shape[:1]:
        raise ValueError(
            "Training needs sample_seeds, one integer for each image, which VisualTokenizerDataCollator makes; got "
            f"{None if sample_seeds is None else list(sample_seeds.shape)} for {len(log_probs)} images."
        )
    return gumbel_noise(sample_seeds, log_probs.shape[1]).to(log_probs.device)


__all__ = ["LavitSelectorLearner"]
