"""Loss of stage 3: a U-Net learns to take the noise out of an image's latents, given what its codes say."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn
from torch.nn import functional as F

from ...modeling.modeling_lavit_token_decoder import LavitTokenDecoder, LavitTokenDecoderOutput
from .guided_attention import GuidedAttention

_PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class DiffusionDraws:
    """What chance decides about a batch.

    Args:
        drop_condition: Whether the condition is dropped, boolean `[batch]`.
        timesteps: How much noise there is, `[batch]`, in `[0, num_timesteps)`.
        posterior_noise: Noise of the VAE's encoder, of the latents' shape.
        noise: What the U-Net has to find, of the latents' shape.
    """

    drop_condition: torch.Tensor
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor


def draw_diffusion(
    sample_seeds: torch.Tensor, latent_shape: tuple[int, ...], num_timesteps: int, condition_dropout: float
) -> DiffusionDraws:
    """Draws what chance decides, for every sample from its own seed alone.

    A sample therefore meets the same noise in whatever batch, process or device it is trained. All is drawn on the
    CPU, in an order that no option changes.

    Args:
        sample_seeds: Integers, `[batch]`.
        latent_shape: Shape of one sample's latents, `[channels, height, width]`.
        num_timesteps: Length of the noise schedule.
        condition_dropout: Probability of dropping the condition.

    Returns:
        [`DiffusionDraws`] on the CPU.
    """
    drops, timesteps, posterior, noise = [], [], [], []
    for seed in sample_seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        drops.append(torch.rand((), generator=generator) < condition_dropout)
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        posterior.append(torch.randn(latent_shape, generator=generator))
        noise.append(torch.randn(latent_shape, generator=generator))
    return DiffusionDraws(*map(torch.stack, (drops, timesteps, posterior, noise)))


def biased_timesteps(num_timesteps: int, strategy: str, multiplier: float, portion: float) -> torch.Tensor:
    """Timesteps of which a part is more frequent, as in diffusers' text-to-image examples.

    Args:
        num_timesteps: Length of the noise schedule.
        strategy: Which part: `"later"` is much noise, where it is decided what a picture shows; `"earlier"` is little
            noise, where its details are; `"none"` is no part.
        multiplier: How many times as often as others its timesteps come.
        portion: Share of the noise schedule that is this part.

    Returns:
        `[num_timesteps]`, in ascending order: a uniform draw of one of these is a biased draw of a timestep.
    """
    weights = torch.ones(num_timesteps, dtype=torch.float64)
    num_biased = int(num_timesteps * portion)
    if strategy == "later":
        weights[num_timesteps - num_biased :] *= multiplier
    elif strategy == "earlier":
        weights[:num_biased] *= multiplier
    share_up_to = (weights / weights.sum()).cumsum(0)
    middles = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
    return torch.searchsorted(share_up_to, middles)


@torch.no_grad()
def encode_latents(vae: Any, pixel_values: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
    """Encodes images as the pipeline decodes them: `latents / scaling_factor` gives them back.

    Args:
        vae: A frozen `AutoencoderKL`.
        pixel_values: Images in [-1, 1], `[batch, 3, height, width]`.
        posterior_noise: Noise of the encoder, `[batch, channels, height / factor, width / factor]`.

    Returns:
        Scaled latents of that shape, fp32.
    """
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * posterior_noise
    return latents * vae.config.scaling_factor


class PixelDecoderLoss(nn.Module):
    """U-Net and token decoder as one module whose output is the loss, so that data parallelism wraps one module.

    Args:
        unet: A `UNet2DConditionModel`.
        token_decoder: Makes its conditions.
        scheduler_config: Configuration of the pipeline's scheduler, which gives the noise schedule and what the U-Net
            predicts (`prediction_type`: `"epsilon"` or `"v_prediction"`).
        snr_gamma: Weighs timesteps by min(SNR, gamma), which evens out how they pull at the weights (Hang et al. 2023,
            https://arxiv.org/abs/2303.09556; 5 is customary). By default all weigh the same.
        guided_attention_weight: Weight of the loss of [`GuidedAttention`], for images whose condition is not dropped.

    Raises:
        ValueError: If the U-Net cannot be trained with that schedule, or its attention not be guided.
    """

    def __init__(
        self,
        unet: Any,
        token_decoder: LavitTokenDecoder,
        scheduler_config: Any,
        snr_gamma: float | None = None,
        guided_attention_weight: float = 0.0,
    ):
        super().__init__()
        self.unet: Any = unet
        self.token_decoder = token_decoder
        # Sampling schedulers differ in how they add noise; all are trained as DDPM, from their betas.
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.snr_gamma = snr_gamma
        self.guided_attention_weight = guided_attention_weight
        self.guided_attention = (
            GuidedAttention(unet, token_decoder.config.num_queries) if guided_attention_weight else None
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type not in _PREDICTION_TYPES:
            raise ValueError(
                f"The scheduler's prediction_type must be one of {', '.join(_PREDICTION_TYPES)}; got "
                f"{prediction_type!r}."
            )
        ends_in_noise = self.scheduler.alphas_cumprod[-1] == 0
        if ends_in_noise and prediction_type == "epsilon":
            raise ValueError(
                "The noise schedule ends in noise alone (rescale_betas_zero_snr), from which a U-Net that predicts "
                "the noise (prediction_type 'epsilon') learns nothing. Use prediction_type 'v_prediction'."
            )
        if ends_in_noise and self.snr_gamma is not None:
            raise ValueError(
                "The noise schedule ends in noise alone (rescale_betas_zero_snr), where snr_gamma gives the weight "
                "zero: the first step of drawing would never be learned. Leave snr_gamma out."
            )
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma must be positive; got {self.snr_gamma}.")

    def enable_gradient_checkpointing(self) -> None:
        """Saves memory at the cost of time.

        Raises:
            ValueError: With guided attention, which keeps what gradient checkpointing throws away.
        """
        if self.guided_attention is not None:
            raise ValueError(
                "Guided attention does not work with gradient checkpointing: leave out gradient_checkpointing or "
                "guided_attention_weight."
            )
        self.unet.enable_gradient_checkpointing()
        if any(value.requires_grad for value in self.token_decoder.layers.parameters()):
            self.token_decoder.gradient_checkpointing_enable()

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def takes_pooled(self) -> bool:
        """Whether the U-Net is an SDXL one, which takes a pooled condition and sizes."""
        return self.unet.config.addition_embed_type == "text_time"

    def forward(
        self,
        latents: torch.Tensor,
        codes: torch.Tensor,
        num_tokens: torch.Tensor | list[int],
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        drop_condition: torch.Tensor,
        time_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents: Scaled latents of the images, `[batch, channels, height, width]`.
            codes: Codes of all images, one after another, `[total]`.
            num_tokens: Codes per image, `[batch]`.
            timesteps: `[batch]`.
            noise: Like the latents.
            drop_condition: Which images are trained without condition, boolean `[batch]`.
            time_ids: Sizes for an SDXL U-Net, `[batch, 6]`.

        Returns:
            `loss`, a scalar; `per_sample`, the losses of drawing that it is the mean of, `[batch]`; `without_codes`,
            the share of images without a code; and with guided attention `guided_attention`, its loss, a scalar that
            `loss` has in it by its weight.
        """
        decoded = self.token_decoder(codes, num_tokens)
        condition, options = self.conditions(decoded, drop_condition, time_ids)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        guided = self.guided_attention
        with nullcontext() if guided is None else guided.watch():
            (prediction,) = self.unet(noisy, timesteps, encoder_hidden_states=condition, return_dict=False, **options)
        losses = F.mse_loss(prediction.float(), self._target(latents, noise, timesteps), reduction="none")
        losses = losses.mean(dim=(1, 2, 3)) * self._weights(timesteps)
        is_empty = torch.as_tensor(num_tokens, device=losses.device) == 0
        output = {"loss": losses.mean(), "per_sample": losses.detach(), "without_codes": is_empty.float().mean()}
        if guided is not None:
            surprise = guided.loss(*latents.shape[-2:]).masked_fill(drop_condition, 0.0).mean()
            output["loss"] = output["loss"] + self.guided_attention_weight * surprise
            output["guided_attention"] = surprise.detach()
        return output

    def conditions(
        self, decoded: LavitTokenDecoderOutput, drop_condition: torch.Tensor, time_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the U-Net is told; where the condition is dropped, that is the pipeline's negative half.

        Returns:
            Conditions `[batch, tokens, width]`, and further arguments of the U-Net.
        """
        # The fields of an output are declared as optional; these are always there.
        assert decoded.negative_condition is not None and decoded.condition is not None
        condition = torch.where(drop_condition[:, None, None], decoded.negative_condition, decoded.condition)
        options: dict[str, Any] = {}
        if decoded.negative_attention_mask is not None:
            options["encoder_attention_mask"] = decoded.negative_attention_mask | ~drop_condition[:, None]
        if self.takes_pooled:
            assert decoded.pooled_condition is not None
            pooled = decoded.pooled_condition.masked_fill(drop_condition[:, None], 0.0)
            options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        return condition, options

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of every sample, `[batch]`: min(SNR, gamma) / SNR, for velocities / (SNR + 1)."""
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps)
        divisor = snr + 1 if self.scheduler.config.prediction_type == "v_prediction" else snr
        return snr.clamp(max=self.snr_gamma) / divisor
