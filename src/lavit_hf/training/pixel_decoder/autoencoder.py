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

from ..accelerated.arguments import LoopArguments, option
from ..accelerated.loop import AcceleratedLoop
from ..dataset import TrainingDataset
from .image_collator import ImageDataCollator


@dataclass
class AutoencoderArguments(LoopArguments):
    """Options of an autoencoder's training, besides those of the training loop."""

    kl_weight: float = option(1e-4, "Weight of the KL divergence, a mean over the latents; keeps them in bounds.")
    num_validation_images: int = option(8, "Images to show in a validation, from the first rows held out for it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("kl_weight", self.kl_weight >= 0, "at least 0")
        self._require("num_validation_images", self.num_validation_images >= 0, "at least 0")


class AutoencoderLoss(nn.Module):
    """Mean absolute error of the pixels, and a little KL divergence.

    Args:
        vae: An `AutoencoderKL`.
        kl_weight: Weight of the divergence.
    """

    def __init__(self, vae: Any, kl_weight: float):
        super().__init__()
        self.vae: Any = vae
        self.kl_weight = kl_weight

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


class AutoencoderTask:
    """An autoencoder's training; a task of [`AcceleratedLoop`].

    Args:
        vae: The `AutoencoderKL` to train, in place. Its weights are made fp32, as training needs them.
        args: Options.
        collator: Makes batches of the samples.
        validation_rows: Samples to validate with, and to measure the scale of the latents on when it is saved; at
            least one.

    Raises:
        ValueError: If there are no such samples.
    """

    def __init__(
        self,
        vae: Any,
        args: AutoencoderArguments,
        collator: ImageDataCollator,
        validation_rows: Sequence[Mapping[str, Any]],
    ) -> None:
        if not validation_rows:
            raise ValueError("An autoencoder needs `validation_rows` to measure the scale of its latents on.")
        self.args, self.collator, self.validation_rows = args, collator, list(validation_rows)
        self.module = AutoencoderLoss(vae.float(), args.kl_weight)
        vae.requires_grad_(True)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def vae(self) -> Any:
        return self.module.vae

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.vae.parameters()), "lr": learning_rate}]

    def enable_gradient_checkpointing(self) -> None:
        self.vae.enable_gradient_checkpointing()

    def to(self, device: torch.device) -> None:
        """Everything is trained, hence moved with `module`."""

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pixels, and the encoder's noise, a function of each sample's seed."""
        pixels = batch["pixel_values"]
        shape = (self.vae.config.latent_channels, pixels.shape[-2] // self.factor, pixels.shape[-1] // self.factor)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["sample_seeds"].tolist()]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return {"pixel_values": pixels, "posterior_noise": noise.to(pixels.device)}

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], PIL.Image.Image | None]:
        """Peak signal-to-noise ratio (dB), and a grid: images above, reconstructions below."""
        errors: list[torch.Tensor] = []
        shown: list[tuple[PIL.Image.Image, PIL.Image.Image]] = []
        processor = VaeImageProcessor()
        for pixels in self._validation_pixels():
            rebuilt = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
            errors.append(((rebuilt - pixels) / 2).square().mean(dim=(1, 2, 3)))
            pairs = zip(processor.postprocess(pixels), processor.postprocess(rebuilt), strict=True)
            shown += list(pairs)[: max(self.args.num_validation_images - len(shown), 0)]
        psnr = -10 * torch.cat(errors).clamp(min=1e-10).log10().mean().item()
        if not shown:
            return {"psnr": psnr}, None
        images = [image for row in zip(*shown, strict=True) for image in row]
        return {"psnr": psnr}, make_image_grid(images, rows=2, cols=len(shown))

    @torch.no_grad()
    def latent_std(self) -> float:
        """Standard deviation of the latents of the validation samples, around zero, the encoder's noise included."""
        posteriors = [self.vae.encode(pixels).latent_dist for pixels in self._validation_pixels()]
        squares = torch.cat([posterior.mean.square() + posterior.var for posterior in posteriors])
        return squares.mean().sqrt().item()

    def _validation_pixels(self) -> list[torch.Tensor]:
        size = self.args.train_batch_size
        starts = range(0, len(self.validation_rows), size)
        batches = [self.collator(self.validation_rows[start : start + size]) for start in starts]
        return [batch["pixel_values"].to(self.vae.device) for batch in batches]

    def save(self, folder: Path) -> None:
        """Saves the VAE, with the scaling factor that gives its latents the standard deviation 1."""
        self.vae.register_to_config(scaling_factor=1 / self.latent_std())
        self.vae.save_pretrained(folder)


def train_autoencoder(
    vae: Any,
    args: AutoencoderArguments,
    dataset: Any,
    collator: ImageDataCollator,
    validation_rows: Sequence[Mapping[str, Any]],
) -> float:
    """Trains an autoencoder and saves it to `args.output_dir`.

    Args:
        vae: The `AutoencoderKL` to train, in place.
        args: Options.
        dataset: A [`TrainingDataset`] of images, or what one can be made of.
        collator: Makes batches of its samples.
        validation_rows: Samples to validate with, and to measure the scale of the latents on.

    Returns:
        The mean loss of the last update; NaN if a run is resumed that had nothing left to do.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If there are no samples to validate with.
    """
    if not isinstance(dataset, TrainingDataset):
        dataset = TrainingDataset(dataset, text_column=None)
    return AcceleratedLoop(AutoencoderTask(vae, args, collator, validation_rows), args, dataset, collator).train()


__all__ = ["AutoencoderArguments", "AutoencoderLoss", "AutoencoderTask", "train_autoencoder"]
