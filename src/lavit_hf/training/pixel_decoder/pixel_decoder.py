"""Stage 3: a U-Net and the token decoder's heads learn to draw images from their codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers.utils import make_image_grid
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...utils.seeds import sample_seed
from ..dataset import TrainingDataset
from .collator import PixelDecoderDataCollator
from .dataset import PixelDecoderDataset
from .loss import PixelDecoderLoss, draw_diffusion, encode_latents
from .trainer import DiffusersTrainer, DiffusersTrainingArguments, option

logger = logging.get_logger(__name__)


@dataclass
class PixelDecoderArguments(DiffusersTrainingArguments):
    """Options of stage 3, besides those of [`DiffusersTrainingArguments`]."""

    condition_dropout: float = option(0.1, "How often the condition is dropped, so that guidance has a contrast.")
    snr_gamma: float | None = option(None, "Min-SNR weighting of the loss; 5 is customary. By default none.")
    train_token_decoder: bool = option(False, "Trains the token decoder (but its codebook), not just its heads.")
    head_learning_rate: float | None = option(None, "Learning rate of the token decoder, if it has one of its own.")
    num_validation_images: int = option(4, "Images to draw in a validation, from the first rows held out for it.")
    validation_inference_steps: int = option(25, "Denoising steps of these.")
    validation_guidance_scale: float = option(4.0, "Guidance of these.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("condition_dropout", 0 <= self.condition_dropout < 1, "in [0, 1)")
        self.require("num_validation_images", self.num_validation_images >= 0, "at least 0")
        rate = self.head_learning_rate
        self.require("head_learning_rate", rate is None or rate > 0, "positive")


def select_trained_parameters(pipeline: Any, train_token_decoder: bool = False) -> dict[str, nn.Parameter]:
    """Freezes a pixel decoder but for its U-Net and the heads that make conditions.

    Args:
        pipeline: A [`LavitPixelDecoderPipeline`].
        train_token_decoder: Whether the rest of the token decoder is trained as well, all but its codebook.

    Returns:
        The trained parameters by name: `unet...`, `token_decoder...`.
    """
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    decoder = pipeline.token_decoder
    trained = [decoder] if train_token_decoder else [decoder.condition_projections, decoder.pooler]
    for module in [pipeline.unet, *trained]:
        if module is not None:  # no pooler in a low-resolution decoder
            module.requires_grad_(True)
    decoder.codebook.requires_grad_(False)  # the visual tokenizer's, of which this is a copy
    parts = {"unet": pipeline.unet, "token_decoder": decoder}
    named = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


class PixelDecoderTrainer(DiffusersTrainer):
    """Trains a pixel decoder: its U-Net, and what of its token decoder is to be trained.

    Args:
        pipeline: The [`LavitPixelDecoderPipeline`] to train, in place. Its weights are made fp32, as training needs
            them.
        args: Options.
        train_dataset: A [`PixelDecoderDataset`].
        data_collator: Makes batches of its samples.
        visual_tokenizer: Frozen; computes the codes of images that come without.
        eval_dataset: Samples to validate with.
        callbacks: Further callbacks.

    Raises:
        ValueError: If VAE and U-Net have different latents, or the schedule cannot be trained.
    """

    def __init__(
        self,
        pipeline: Any,
        args: PixelDecoderArguments,
        train_dataset: Any,
        data_collator: PixelDecoderDataCollator,
        visual_tokenizer: Any = None,
        eval_dataset: Sequence[Mapping[str, Any]] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        channels, expected = pipeline.vae.config.latent_channels, pipeline.unet.config.in_channels
        if channels != expected:
            raise ValueError(f"The VAE's latents have {channels} channels, but the U-Net takes {expected}.")
        self.pipeline, self.visual_tokenizer = pipeline, visual_tokenizer
        self._has_warned = False
        for component in (pipeline.unet, pipeline.token_decoder, pipeline.vae):
            component.float()
        pipeline.vae.eval()
        if visual_tokenizer is not None:
            visual_tokenizer.requires_grad_(False).eval()
        self.trained = select_trained_parameters(pipeline, args.train_token_decoder)
        self.loss = PixelDecoderLoss(pipeline.unet, pipeline.token_decoder, pipeline.scheduler.config, args.snr_gamma)
        parts = [*pipeline.components.values(), visual_tokenizer]
        super().__init__(
            self.loss,
            args,
            train_dataset,
            data_collator,
            eval_dataset=eval_dataset,
            frozen=[part for part in parts if isinstance(part, nn.Module)],
            callbacks=callbacks,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The U-Net, and the token decoder with a learning rate of its own, if it has one."""
        rate = self.args.learning_rate
        rates = {"unet": rate, "token_decoder": self.args.head_learning_rate or rate}
        return [
            {"params": [value for name, value in self.trained.items() if name.startswith(f"{part}.")], "lr": rate}
            for part, rate in rates.items()
        ]

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Codes, latents and noise of a batch, as [`PixelDecoderLoss`] takes them."""
        pixels = batch["pixel_values"]
        codes, num_tokens = self._codes(batch)
        factor = self.pipeline.vae_scale_factor
        shape = (self.pipeline.unet.config.in_channels, pixels.shape[-2] // factor, pixels.shape[-1] // factor)
        draws = draw_diffusion(batch["sample_seeds"], shape, self.loss.num_timesteps, self.args.condition_dropout)
        return {
            "latents": encode_latents(self.pipeline.vae, pixels, draws.posterior_noise.to(pixels.device)),
            "codes": codes,
            "num_tokens": num_tokens,
            "timesteps": draws.timesteps.to(pixels.device),
            "noise": draws.noise.to(pixels.device),
            "drop_condition": draws.drop_condition.to(pixels.device),
            "time_ids": batch["time_ids"],
        }

    def _codes(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if "codes" in batch:
            codes, num_tokens = batch["codes"], batch["num_tokens"]
        elif self.visual_tokenizer is None:
            raise ValueError("The samples have no codes, and there is no visual tokenizer to compute them.")
        else:
            output = self.visual_tokenizer.encode(batch["tokenizer_pixel_values"])
            codes, num_tokens = output.codes, output.num_tokens
        if not self._has_warned and (empty := num_tokens == 0).any():
            self._has_warned = True
            logger.warning(
                f"There are no codes to draw sample {batch['sample_ids'][empty].tolist()} from: nothing tells the "
                "U-Net what to draw. The log counts such samples (without_codes); if there are many, the visual "
                "tokenizer's selector keeps nothing."
            )
        return codes, num_tokens

    def score(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss, always at the same noise."""
        return self.model(**self.prepare(batch))["per_sample"]

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> PIL.Image.Image | None:
        """A grid of the first samples: images above, drawings below."""
        shown = rows[: self.args.num_validation_images]
        if not shown:
            return None
        batch = {name: value.to(self.args.device) for name, value in self.data_collator(shown).items()}
        codes, num_tokens = self._codes(batch)
        truth = self.pipeline.image_processor.postprocess(batch["pixel_values"].cpu())
        seeds = [sample_seed(self.args.seed, 0, index, "validation drawing") for index in range(len(truth))]
        self.pipeline.set_progress_bar_config(disable=True)
        drawn = self.pipeline(
            list(codes.split(num_tokens.tolist())),
            height=batch["pixel_values"].shape[-2],
            width=batch["pixel_values"].shape[-1],
            num_inference_steps=self.args.validation_inference_steps,
            guidance_scale=self.args.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return make_image_grid([*truth, *drawn], rows=2, cols=len(truth))

    def save_networks(self, folder: Path) -> None:
        """Saves the pipeline."""
        self.pipeline.save_pretrained(folder)


def train_pixel_decoder(
    pipeline: Any,
    args: PixelDecoderArguments,
    dataset: Any,
    collator: PixelDecoderDataCollator,
    visual_tokenizer: Any = None,
    validation_rows: Sequence[Mapping[str, Any]] = (),
) -> PixelDecoderTrainer:
    """Trains a pixel decoder, from `args.resume_from_checkpoint` if there is one, and saves it to `args.output_dir`.

    Args:
        pipeline: The [`LavitPixelDecoderPipeline`] to train, in place.
        args: Options.
        dataset: A [`PixelDecoderDataset`], or what one can be made of.
        collator: Makes batches of its samples.
        visual_tokenizer: Frozen; computes the codes of images that come without.
        validation_rows: Samples to validate with.

    Returns:
        The trainer, whose `state.log_history` has the losses.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If the parts do not fit together, or a sample does not fit the decoder.
    """
    if not isinstance(dataset, TrainingDataset):
        dataset = PixelDecoderDataset(dataset)
    trainer = PixelDecoderTrainer(pipeline, args, dataset, collator, visual_tokenizer, validation_rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer


__all__ = [
    "PixelDecoderArguments",
    "PixelDecoderTrainer",
    "select_trained_parameters",
    "train_pixel_decoder",
]
