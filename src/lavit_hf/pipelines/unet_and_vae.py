"""What pipelines with a U-Net and a VAE offer: LoRA for the one, tiles and slices for the other."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin


class UNetAndVaeMixin(StableDiffusionLoraLoaderMixin):
    """LoRA, tiling and slicing as in the pipelines of Stable Diffusion, which have text encoders in addition."""

    _lora_loadable_modules = ["unet"]
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def load_lora_weights(  # type: ignore[override]  # as other pipelines declare it
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA weights into the U-Net, see [`StableDiffusionLoraLoaderMixin.load_lora_weights`].

        Args:
            pretrained_model_name_or_path_or_dict: Directory, Hub id or the tensors themselves, such as
                `save_lora_weights` writes them; names start with `unet.`.
            adapter_name: What to call it; `default_0` and so on by default.
            hotswap: Whether to replace the adapter of that name in place.
            **kwargs: For `lora_state_dict`, such as `weight_name`.

        Raises:
            ValueError: If there are no LoRA weights of a U-Net.
        """
        options = {name: kwargs.pop(name) for name in ("low_cpu_mem_usage",) if name in kwargs}
        source = pretrained_model_name_or_path_or_dict
        state_dict, alphas, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else source,
            unet_config=self.unet.config,
            return_lora_metadata=True,
            **kwargs,
        )
        if not any(name.startswith(f"{self.unet_name}.") and "lora" in name for name in state_dict):
            raise ValueError(f"There are no LoRA weights of a U-Net: {self.unet_name}.*.lora_*")
        self.load_lora_into_unet(
            state_dict,
            network_alphas=alphas,
            unet=self.unet,
            adapter_name=adapter_name,
            _pipeline=self,
            hotswap=hotswap,
            metadata=metadata,
            **options,
        )

    def fuse_lora(self, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """Adds LoRA weights to those of the U-Net, see [`StableDiffusionLoraLoaderMixin.fuse_lora`]."""
        super().fuse_lora(["unet"] if components is None else components, *args, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes fused LoRA weights out of those of the U-Net again."""
        super().unfuse_lora(components=["unet"] if components is None else components, **kwargs)

    def enable_vae_tiling(self) -> None:
        """Decodes large images tile by tile, with less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes images whole again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decodes the images of a batch one by one, with less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes batches at once again."""
        self.vae.disable_slicing()
