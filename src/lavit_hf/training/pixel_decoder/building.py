"""New pixel decoders, for a token decoder that has none yet."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel

from ...modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from ...pipelines import LavitPixelDecoderPipeline

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
    config = copy.deepcopy(token_decoder.config)
    config.cross_attention_dims, config.pooled_size = list(cross_attention_dims), pooled_size
    config.num_negative_tokens = 0  # stored rows belong to the old U-Net
    decoder = LavitTokenDecoder(config)
    kept = {
        name: value
        for name, value in token_decoder.state_dict().items()
        if not name.startswith(_HEADS) and name != "negative_condition"
    }
    missing = set(decoder.load_state_dict(kept, strict=False).missing_keys)
    assert all(name.startswith(_HEADS) for name in missing)
    return decoder.to(token_decoder.dtype)


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
    width, pooled = _condition_widths(unet.config)
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


def _condition_widths(unet_config: Any) -> tuple[int, int | None]:
    """Width of the U-Net's condition, and of the pooled one if it takes one."""
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


__all__ = ["build_pixel_decoder", "with_condition_heads"]
