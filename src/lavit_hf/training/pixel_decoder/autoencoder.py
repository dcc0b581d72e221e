"""A small VAE of one's own, where that of Stable Diffusion is too large or does not fit the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from ..dataset import TrainingDataset
from ..streaming import StreamedTrainingDataset
from .data import ImageDataCollator
from .trainer import DiffusersTrainer, DiffusersTrainingArguments, option


@dataclass
class AutoencoderArguments(DiffusersTrainingArguments):
    """Options of an autoencoder's training, besides those of [`DiffusersTrainingArguments`]."""

    kl_weight: float = option(1e-4, "Weight of the KL divergence, a mean over the latents; keeps them in bounds.")
    num_validation_images: int = option(8, "Images to show in a validation, from the first rows held out for it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("kl_weight", self.kl_weight >= 0, "at least 0")


class AutoencoderLoss(nn.Module):
    """Mean absolute error of the pixels of an `AutoencoderKL`, and a little KL divergence."""

    def __init__(self, vae: Any, kl_weight: float):
        super().__init__()
        self.vae: Any = vae
        self.kl_weight = kl_weight

    def enable_gradient_checkpointing(self) -> None:
        """Saves memory at the cost of time."""
        self.vae.enable_gradient_checkpointing()

    def forward(self, pixel_values: torch.Tensor, posterior_noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: Images in [-1, 1], `[batch, 3, height, width]`.
            posterior_noise: Noise of the encoder, `[batch, channels, height / factor, width / factor]`.

        Returns:
            The scalars `loss`, `absolute_error` and `kl`.
        """
        posterior = self.vae.encode(pixel_values).latent_dist
        latents = posterior.mean + posterior.std * posterior_noise
        error = F.l1_loss(self.vae.decode(latents).sample.float(), pixel_values)
        kl = posterior.kl().mean() / latents[0].numel()
        return {"loss": error + self.kl_weight * kl, "absolute_error": error, "kl": kl}


class AutoencoderTrainer(DiffusersTrainer):
    """Trains an autoencoder.

    Args:
        vae: The `AutoencoderKL` to train, in place. Its weights are made fp32, as training needs them.
        args: Options.
        train_dataset: A [`TrainingDataset`] of images.
        data_collator: Makes batches of its samples.
        eval_dataset: Samples to validate with, and to measure the scale of the latents on when it is saved; at least
            one.
        callbacks: Further callbacks.

    Raises:
        ValueError: If there are no samples to validate with.
    """

    eval_metric = "psnr"
    args: AutoencoderArguments

    def __init__(
        self,
        vae: Any,
        args: AutoencoderArguments,
        train_dataset: Any,
        data_collator: ImageDataCollator,
        eval_dataset: Sequence[Mapping[str, Any]],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if not eval_dataset:
            raise ValueError("An autoencoder needs an `eval_dataset` to measure the scale of its latents on.")
        self.vae = vae.float().requires_grad_(True)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(
            AutoencoderLoss(vae, args.kl_weight),
            args,
            train_dataset,
            data_collator,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pixels, and the encoder's noise, a function of each sample's seed."""
        pixels = batch["pixel_values"]
        shape = (self.vae.config.latent_channels, pixels.shape[-2] // self.factor, pixels.shape[-1] // self.factor)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["sample_seeds"].tolist()]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return {"pixel_values": pixels, "posterior_noise": noise.to(pixels.device)}

    def score(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Peak signal-to-noise ratio (dB) of reconstructions."""
        pixels = batch["pixel_values"]
        errors = ((self._rebuild(pixels) - pixels) / 2).square().mean(dim=(1, 2, 3))
        return -10 * errors.clamp(min=1e-10).log10()

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> PIL.Image.Image:
        """A grid: images above, reconstructions below."""
        images: list[PIL.Image.Image] = []
        rebuilt: list[PIL.Image.Image] = []
        processor = VaeImageProcessor()
        for batch in self.eval_batches(rows):
            images += processor.postprocess(batch["pixel_values"])
            rebuilt += processor.postprocess(self._rebuild(batch["pixel_values"]))
        return make_image_grid(images + rebuilt, rows=2, cols=len(rows))

    def _rebuild(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)

    @torch.no_grad()
    def latent_std(self) -> float:
        """Standard deviation of the latents of the validation samples, around zero, the encoder's noise included."""
        batches = self.eval_batches(self.eval_dataset or ())
        posteriors = [self.vae.encode(batch["pixel_values"]).latent_dist for batch in batches]
        squares = torch.cat([posterior.mean.square() + posterior.var for posterior in posteriors])
        return squares.mean().sqrt().item()

    def save_networks(self, folder: Path) -> None:
        """Saves the VAE, with the scaling factor that gives its latents the standard deviation 1."""
        self.vae.register_to_config(scaling_factor=1 / self.latent_std())
        self.vae.save_pretrained(folder)


def train_autoencoder(
    vae: Any,
    args: AutoencoderArguments,
    dataset: Any,
    collator: ImageDataCollator,
    validation_rows: Sequence[Mapping[str, Any]],
) -> AutoencoderTrainer:
    """Trains an autoencoder, from `args.resume_from_checkpoint` if there is one, and saves it to `args.output_dir`.

    Args:
        vae: The `AutoencoderKL` to train, in place.
        args: Options.
        dataset: A [`TrainingDataset`] of images, or what one can be made of; or a [`StreamedTrainingDataset`] of them.
        collator: Makes batches of its samples.
        validation_rows: Samples to validate with, and to measure the scale of the latents on.

    Returns:
        The trainer, whose `state.log_history` has the losses.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If there are no samples to validate with.
    """
    if not isinstance(dataset, (TrainingDataset, StreamedTrainingDataset)):
        dataset = TrainingDataset(dataset, text_column=None)
    return AutoencoderTrainer(vae, args, dataset, collator, validation_rows).train_and_save()
