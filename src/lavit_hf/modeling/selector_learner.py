"""How the selector learns to decide, and how it is kept from decisions that only noise makes look healthy."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..utils.distributed import gather_rows, sum_over_processes, take_from_first_process, world_size
from .configuration_lavit_pretraining import LavitPreTrainingConfig
from .gumbel import gumbel_noise, straight_through_keep
from .selector import KEEP, LavitSelector, select_patches


class LavitSelectorLearner(nn.Module):
    """Takes the decisions of training, and follows what calibration needs.

    Under Gumbel noise a selector that gives every patch the probability rho meets the wanted rate, while its argmax
    keeps nothing. So the noise ends when the selector has learned: `threshold` is measured for some more steps, and
    then subtracted from its bias, after which the argmax keeps the wanted share, those patches that it likes best.
    """

    threshold: torch.Tensor

    def __init__(self, config: LavitPreTrainingConfig):
        super().__init__()
        self.config = config
        self.register_buffer("threshold", torch.zeros(()))  # log-odds that the wanted share of patches exceeds

    @torch.compiler.disable(recursive=False)
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
        learned, calibrated = self._schedule()
        if self.training and step == calibrated > learned:
            self._shift(selector)
        if step < learned:
            log_probs = selector(patch_features)
        else:
            with torch.no_grad():
                log_probs = selector(patch_features)
        select_patches(log_probs.detach())  # complains about NaN
        noise = None
        if self.training and step < calibrated:
            noise = _noise(sample_seeds, log_probs)
            if step >= learned:
                self._measure(log_probs, step - learned)
        return log_probs, straight_through_keep(log_probs, noise, self.config.gumbel_temperature)

    def _schedule(self) -> tuple[float, float]:
        """Steps at which the selector stops learning, and from which on the argmax decides."""
        steps = self.config.selector_steps
        if steps is None:
            return math.inf, math.inf
        return steps, steps + (self.config.calibration_steps if steps > 0 else 0)

    @torch.compiler.disable
    @torch.no_grad()
    def _measure(self, log_probs: torch.Tensor, num_measured: float) -> None:
        """Averages the threshold over steps, each of them over the batches of all processes."""
        log_odds = gather_rows((log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).reshape(-1, 1)).flatten()
        rank = min(max(round((1 - self.config.keep_rate) * len(log_odds)), 1), len(log_odds))
        self.threshold.lerp_(log_odds.kthvalue(rank).values, 1 / (num_measured + 1))

    @torch.compiler.disable
    @torch.no_grad()
    def _shift(self, selector: LavitSelector) -> None:
        take_from_first_process(self.threshold)
        selector.out_proj_3.bias[KEEP] -= self.threshold


def keep_rate_loss(keep: torch.Tensor, config: LavitPreTrainingConfig) -> torch.Tensor:
    """Squared distance of the kept share from the wanted one.

    Args:
        keep: 1 where a patch is kept, else 0, with a gradient, `[batch, num_patches]`.
        config: The wanted share, and whether it is that of every image or of all of them, those of other processes
            included.
    """
    rate = keep.mean(dim=-1)
    if config.keep_rate_per_image:
        return (config.keep_rate - rate).square().mean()
    mean = rate.mean()
    # Of all processes, with this one's share of the gradient: gradients are averaged afterwards.
    mean = sum_over_processes(mean) / world_size() + (mean - mean.detach())
    return (config.keep_rate - mean).square()


def _noise(sample_seeds: torch.Tensor | None, log_probs: torch.Tensor) -> torch.Tensor:
    if sample_seeds is None or sample_seeds.shape != log_probs.shape[:1]:
        raise ValueError(
            "Training needs sample_seeds, one integer for each image, which VisualTokenizerDataCollator makes; got "
            f"{None if sample_seeds is None else list(sample_seeds.shape)} for {len(log_probs)} images."
        )
    return gumbel_noise(sample_seeds, log_probs.shape[1]).to(log_probs.device)


__all__ = ["LavitSelectorLearner", "keep_rate_loss"]
