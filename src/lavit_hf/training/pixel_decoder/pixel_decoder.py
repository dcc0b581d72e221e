"""Stage 3: a U-Net and the token decoder's heads, new or trained before, learn to draw images from their codes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils import make_image_grid
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from ...modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer, same_codebooks
from ...pipelines import LavitPixelDecoderPipeline
from ...utils.seeds import sample_seed
from ..dataset import TrainingDataset
from ..streaming import StreamedTrainingDataset
from .data import PixelDecoderDataCollator, PixelDecoderDataset
from .loss import PixelDecoderLoss, biased_timesteps, draw_diffusion, encode_latents
from .trainer import DiffusersTrainer, DiffusersTrainingArguments, option

logger = logging.get_logger(__name__)

_HEADS = ("condition_projections.", "pooler.")
_SIZE_IDS = 6  # numbers that SDXL is told: original size, crop, size to draw
# What learned well from scratch: velocities, on a schedule that ends in noise alone, as drawing begins.
_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def with_condition_heads(
    token_decoder: LavitTokenDecoder, cross_attention_dims: list[int], pooled_size: int | None = None
) -> LavitTokenDecoder:
    """A token decoder with the same weights and new heads, for a U-Net of other widths.

    Args:
        token_decoder: Its weights but for the heads are copied.
        cross_attention_dims: Widths of the condition heads.
        pooled_size: Width of the pooled condition; `None` for none.

    Returns:
        The new token decoder; its heads are random.
    """
    # Stored negative rows belong to the old U-Net.
    return _exchange_heads(token_decoder, list(cross_attention_dims), pooled_size, num_negative_tokens=0)


def replace_token_decoder(pipeline: LavitPixelDecoderPipeline, token_decoder: LavitTokenDecoder) -> None:
    """Has a pixel decoder go on with codes of another visual tokenizer, or of one that has learned more.

    U-Net, VAE and heads stay what they are. Drawings are of use as far as the new token decoder makes the same
    features of its codes as the old one did, for which both have to have learned from one vision encoder.

    Args:
        pipeline: The pixel decoder, changed in place.
        token_decoder: That of the other stage 1; copied.

    Raises:
        ValueError: If the heads do not fit its features.
    """
    old, sizes = pipeline.token_decoder, pipeline.token_decoder.config
    decoder = _exchange_heads(token_decoder, sizes.cross_attention_dims, sizes.pooled_size, sizes.num_negative_tokens)
    random, heads = (
        {name: value for name, value in part.state_dict().items() if _is_head(name)} for part in (decoder, old)
    )
    if {name: value.shape for name, value in random.items()} != {name: value.shape for name, value in heads.items()}:
        raise ValueError(
            f"The pixel decoder's heads are for features of width {old.config.output_size}, and those of the new "
            f"token decoder have {token_decoder.config.output_size}: take one of its sizes, or train from scratch."
        )
    decoder.load_state_dict(heads, strict=False)
    pipeline.register_modules(token_decoder=decoder.to(old.device, old.dtype))


def _exchange_heads(
    token_decoder: LavitTokenDecoder,
    cross_attention_dims: list[int],
    pooled_size: int | None,
    num_negative_tokens: int,
) -> LavitTokenDecoder:
    """The same weights with random heads of these sizes."""
    config = copy.deepcopy(token_decoder.config)
    config.cross_attention_dims, config.pooled_size = cross_attention_dims, pooled_size
    config.num_negative_tokens = num_negative_tokens
    decoder = LavitTokenDecoder(config)
    kept = {name: value for name, value in token_decoder.state_dict().items() if not _is_head(name)}
    missing = decoder.load_state_dict(kept, strict=False).missing_keys
    assert all(map(_is_head, missing))
    return decoder.to(token_decoder.dtype)  # type: ignore[arg-type]  # its wrapper hides self


def _is_head(name: str) -> bool:
    """Whether weights of a token decoder belong to a U-Net, and are trained in stage 3."""
    return name.startswith(_HEADS) or name == "negative_condition"


def build_pixel_decoder(
    token_decoder: LavitTokenDecoder,
    vae: Any,
    unet_config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any] | None = None,
    visual_token_offset: int | None = None,
    eoi_token_id: int | None = None,
) -> Any:
    """A pixel decoder with a new U-Net.

    Args:
        token_decoder: From stage 1; gets new heads if its own do not fit the U-Net.
        vae: Trained; an `AutoencoderKL`.
        unet_config: Configuration of a `UNet2DConditionModel`; the channels of its latents are those of the VAE.
        scheduler_config: Changes to the schedule: by default DDIM with v-prediction and zero terminal SNR.
        visual_token_offset: As in [`LavitPixelDecoderPipeline`].
        eoi_token_id: As in [`LavitPixelDecoderPipeline`].

    Returns:
        A [`LavitPixelDecoderPipeline`] whose U-Net (and heads, if they are new) is random: seed before.

    Raises:
        ValueError: If the U-Net's configuration has no single `cross_attention_dim`, or lacks what SDXL needs.
    """
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel.from_config({**unet_config, "in_channels": channels, "out_channels": channels})
    width, pooled = condition_widths(unet.config)
    config = token_decoder.config
    if sum(config.cross_attention_dims) != width or config.pooled_size != pooled:
        token_decoder = with_condition_heads(token_decoder, [width], pooled)
    scheduler = DDIMScheduler.from_config({**_SCHEDULER, **(scheduler_config or {})})
    return LavitPixelDecoderPipeline(
        token_decoder=token_decoder,
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        visual_token_offset=visual_token_offset,
        eoi_token_id=eoi_token_id,
    )


def condition_widths(unet_config: Any) -> tuple[int, int | None]:
    """Width of a U-Net's condition, and of the pooled one if it takes one.

    Raises:
        ValueError: It has no single `cross_attention_dim`, or lacks what SDXL needs.
    """
    width = unet_config.cross_attention_dim
    if not isinstance(width, int):
        raise ValueError(f"The U-Net needs one `cross_attention_dim` for all blocks; got {width!r}.")
    if unet_config.addition_embed_type is None:
        return width, None
    if unet_config.addition_embed_type != "text_time":
        raise ValueError(
            f"`addition_embed_type` must be 'text_time', as in SDXL, or null; got {unet_config.addition_embed_type!r}."
        )
    total = unet_config.projection_class_embeddings_input_dim
    pooled = total - _SIZE_IDS * unet_config.addition_time_embed_dim
    if pooled < 1:
        raise ValueError(
            f"`projection_class_embeddings_input_dim` ({total}) leaves no room for a pooled condition beside "
            f"{_SIZE_IDS} sizes of `addition_time_embed_dim` {unet_config.addition_time_embed_dim}."
        )
    return width, pooled


@dataclass
class PixelDecoderArguments(DiffusersTrainingArguments):
    """Options of stage 3, besides those of [`DiffusersTrainingArguments`]."""

    condition_dropout: float = option(0.1, "How often the condition is dropped, so that guidance has a contrast.")
    snr_gamma: float | None = option(None, "Min-SNR weighting of the loss; 5 is customary. By default none.")
    timestep_bias_strategy: str = option(
        "none", "Which timesteps come more often: earlier, later (much noise) or none."
    )
    timestep_bias_multiplier: float = option(1.0, "How many times as often as the others.")
    timestep_bias_portion: float = option(0.25, "Share of the noise schedule that these are.")
    guided_attention_weight: float = option(
        0.0, "For a U-Net from scratch: how much its cross-attention is shown where to look; 0.1 did well."
    )
    train_token_decoder: bool = option(False, "Trains the token decoder (but its codebook), not just its heads.")
    head_learning_rate: float | None = option(None, "Learning rate of the token decoder, if it has one of its own.")
    validation_inference_steps: int = option(25, "Denoising steps of drawings to validate with.")
    validation_guidance_scale: float = option(4.0, "Guidance of drawings to validate with.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("condition_dropout", 0 <= self.condition_dropout < 1, "in [0, 1)")
        strategies = ("none", "earlier", "later")
        self.require("timestep_bias_strategy", self.timestep_bias_strategy in strategies, "none, earlier or later")
        self.require("timestep_bias_multiplier", 0 < self.timestep_bias_multiplier < math.inf, "positive")
        self.require("timestep_bias_portion", 0 < self.timestep_bias_portion < 1, "between 0 and 1")
        self.require("guided_attention_weight", self.guided_attention_weight >= 0, "at least 0")
        rate = self.head_learning_rate
        self.require("head_learning_rate", rate is None or rate > 0, "positive")


def select_trained_parameters(
    pipeline: LavitPixelDecoderPipeline, train_token_decoder: bool = False
) -> dict[str, nn.Parameter]:
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
        train_dataset: A [`PixelDecoderDataset`], or a [`StreamedTrainingDataset`] of images.
        data_collator: Makes batches of its samples.
        visual_tokenizer: Frozen; computes the codes of images that come without.
        eval_dataset: Samples to validate with.
        callbacks: Further callbacks.

    Raises:
        ValueError: If VAE and U-Net have different latents, the visual tokenizer other codes than the token decoder,
            the schedule cannot be trained, or the attention not be guided.
    """

    args: PixelDecoderArguments

    def __init__(
        self,
        pipeline: LavitPixelDecoderPipeline,
        args: PixelDecoderArguments,
        train_dataset: Any,
        data_collator: PixelDecoderDataCollator,
        visual_tokenizer: LavitVisualTokenizer | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        channels, expected = pipeline.vae.config.latent_channels, pipeline.unet.config.in_channels
        if channels != expected:
            raise ValueError(f"The VAE's latents have {channels} channels, but the U-Net takes {expected}.")
        if visual_tokenizer is not None:
            _require_same_codes(visual_tokenizer, pipeline.token_decoder)
        self.pipeline, self.visual_tokenizer = pipeline, visual_tokenizer
        self._has_warned = False
        for component in (pipeline.unet, pipeline.token_decoder, pipeline.vae):
            component.float()
        pipeline.vae.eval()
        if visual_tokenizer is not None:
            visual_tokenizer.requires_grad_(False).eval()
        self.trained = select_trained_parameters(pipeline, args.train_token_decoder)
        self.loss = PixelDecoderLoss(
            pipeline.unet,
            pipeline.token_decoder,
            pipeline.scheduler.config,
            args.snr_gamma,
            args.guided_attention_weight,
        )
        self._biased_timesteps = biased_timesteps(
            self.loss.num_timesteps,
            args.timestep_bias_strategy,
            args.timestep_bias_multiplier,
            args.timestep_bias_portion,
        )
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
        # Validation is of all timesteps alike, so that it compares runs of whatever bias.
        timesteps = self._biased_timesteps[draws.timesteps] if self.loss.training else draws.timesteps
        return {
            "latents": encode_latents(self.pipeline.vae, pixels, draws.posterior_noise.to(pixels.device)),
            "codes": codes,
            "num_tokens": num_tokens,
            "timesteps": timesteps.to(pixels.device),
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
            output: Any = self.visual_tokenizer.encode(batch["tokenizer_pixel_values"])
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

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> PIL.Image.Image:
        """A grid: images above, drawings below."""
        batch = {name: value.to(self.args.device) for name, value in self.data_collator(rows).items()}
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


def _require_same_codes(visual_tokenizer: LavitVisualTokenizer, token_decoder: LavitTokenDecoder) -> None:
    quantizer = visual_tokenizer.discrete.quantizer
    assert quantizer is not None
    own, theirs = quantizer.codebook.weight, token_decoder.codebook.weight
    if not same_codebooks(own, theirs):
        what = "they differ" if own.shape == theirs.shape else f"{list(own.shape)} and {list(theirs.shape)}"
        raise ValueError(
            "The token decoder was trained with the codes of another visual tokenizer: their codebooks are not the "
            f"same ({what}). Take the visual_tokenizer and the token_decoder of one stage 1, or the visual tokenizer "
            "that belongs to the pixel decoder."
        )


def train_pixel_decoder(
    pipeline: LavitPixelDecoderPipeline,
    args: PixelDecoderArguments,
    dataset: Any,
    collator: PixelDecoderDataCollator,
    visual_tokenizer: LavitVisualTokenizer | None = None,
    validation_rows: Sequence[Mapping[str, Any]] = (),
) -> PixelDecoderTrainer:
    """Trains a pixel decoder, from `args.resume_from_checkpoint` if there is one, and saves it to `args.output_dir`.

    Args:
        pipeline: The [`LavitPixelDecoderPipeline`] to train, in place.
        args: Options.
        dataset: A [`PixelDecoderDataset`], or what one can be made of; or a [`StreamedTrainingDataset`] of images.
        collator: Makes batches of its samples.
        visual_tokenizer: Frozen; computes the codes of images that come without.
        validation_rows: Samples to validate with.

    Returns:
        The trainer, whose `state.log_history` has the losses.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If the parts do not fit together, or a sample does not fit the decoder.
    """
    if not isinstance(dataset, (TrainingDataset, StreamedTrainingDataset)):
        dataset = PixelDecoderDataset(dataset)
    trainer = PixelDecoderTrainer(pipeline, args, dataset, collator, visual_tokenizer, validation_rows)
    return trainer.train_and_save()
