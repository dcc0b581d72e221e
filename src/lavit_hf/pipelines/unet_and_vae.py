"""What pipelines with a U-Net and a VAE offer: LoRA, tiles and slices, and drawing faster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

_COMPILED_PARTS = ("blocks", "whole")
# Of torchao: weights and what they are multiplied with, as a U-Net computes more than it reads.
_QUANTIZATIONS = {
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
    "int8": "Int8DynamicActivationInt8WeightConfig",
}
_QUANTIZED_MULTIPLE = 16  # of widths, which kernels of 8 bits want
_FP8_CAPABILITY = (8, 9)
_FUSED_LAYERS = ("to_qkv", "to_kv")
WARM_UP_STEPS = 2


class UNetAndVaeMixin(StableDiffusionLoraLoaderMixin):
    """LoRA, tiling and slicing as in the pipelines of Stable Diffusion, which have text encoders in addition."""

    _lora_loadable_modules = ["unet"]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    set_progress_bar_config: Callable[..., None]  # that of `DiffusionPipeline`

    def optimize(
        self,
        *,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        compile: str | None = "blocks",
        quantization: str | None = None,
        fuse_projections: bool = False,
        warm_up: bool = True,
        **compile_options: Any,
    ) -> Self:
        """Prepares a pipeline that stays where it is to draw many pictures faster, and draws one to get ready.

        U-Net and VAE are put in the order of memory that convolutions on GPUs prefer (channels last), and parts of
        the U-Net are compiled, which takes a while when they run first: in the warm-up. If there is not enough memory
        for the VAE in the warm-up, it decodes images one by one, and if that does not help, tile by tile.

        Load LoRA, and move the pipeline, before. Who wants its U-Net as it was loads the pipeline again.

        Args:
            batch_size: Pictures at a time, in the warm-up, like the following three.
            height: See `__call__`.
            width: See `__call__`.
            aspect_ratio: See `__call__`.
            compile: What to compile of the U-Net: `"blocks"`, its transformer blocks, once for all of them;
                `"whole"`, all of it, which takes much longer, by default with CUDA graphs (`mode="reduce-overhead"`);
                or `None`.
            quantization: `"fp8"` or `"int8"`: computes the linear layers of the transformer blocks in 8 bits, by
                torchao. Pictures get a little different. The U-Net can then neither be saved nor adapted.
            fuse_projections: Whether queries, keys and values are projected by one layer, whose weights come in
                addition. To save or adapt the U-Net, call `unfuse_projections` first.
            warm_up: Whether to draw one batch right away, which also compiles.
            **compile_options: For [`torch.compile`], such as `mode`, `backend` or `fullgraph`.

        Returns:
            The pipeline itself.

        Raises:
            ImportError: If torchao is needed and not installed.
            ValueError: If an argument is unknown, LoRA would be left out, or the GPU cannot compute in fp8.
        """
        if compile not in (None, *_COMPILED_PARTS):
            raise ValueError(f"`compile` must be one of {', '.join(_COMPILED_PARTS)}, or None; got {compile!r}.")
        if compile is None and compile_options:
            raise ValueError(
                f"{', '.join(compile_options)}: options of torch.compile have no effect without `compile`."
            )
        if (quantization or fuse_projections) and getattr(self.unet, "peft_config", None):
            raise ValueError(
                "`quantization` and `fuse_projections` take the U-Net's own weights and would leave out its LoRA: "
                "call fuse_lora() and unload_lora_weights() first."
            )
        if quantization is not None:
            quantize_unet(self.unet, quantization)
        for model in (self.unet, self.vae):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # its wrapper hides self
        if fuse_projections:
            self.unet.fuse_qkv_projections()
        if compile == "blocks":
            self.unet.compile_repeated_blocks(**compile_options)
        elif compile == "whole":
            self.unet.compile(**(compile_options or {"mode": "reduce-overhead"}))
        if warm_up:
            size = {"height": height, "width": width, "aspect_ratio": aspect_ratio}
            with self._bar_of_warm_up():
                self._warm_up(batch_size, **size)
        return self

    def _warm_up(self, batch_size: int, **size: Any) -> None:
        """Draws a batch in a few steps."""
        raise NotImplementedError

    @contextmanager
    def _bar_of_warm_up(self) -> Iterator[None]:
        """Says on the bars of the pipeline what they are for."""
        options = getattr(self, "_progress_bar_config", {})
        self.set_progress_bar_config(**{**options, "desc": "Warming up"})
        try:
            yield
        finally:
            self.set_progress_bar_config(**options)

    def _draw_in_memory(self, draw: Callable[[], Any]) -> None:
        """Draws, and has the VAE take less memory if there is not enough."""
        for save_memory in (self.enable_vae_slicing, self.enable_vae_tiling):
            try:
                draw()
                return
            except torch.OutOfMemoryError:
                pass  # what it held is free only behind this block
            save_memory()
            logger.warning(f"There was not enough memory to draw: {save_memory.__name__}() makes the VAE take less.")
        draw()

    def unfuse_projections(self) -> None:
        """Takes back the `fuse_projections` of `optimize`, after which the U-Net can be saved and adapted again."""
        fused = [one for one in self.unet.modules() if isinstance(one, Attention) and one.fused_projections]
        if fused:
            self.unet.unfuse_qkv_projections()
            for module in fused:
                module.fused_projections = False
                for name in _FUSED_LAYERS:
                    if hasattr(module, name):
                        delattr(module, name)

    def check_weights(self, what: str) -> None:
        """Raises a `ValueError` if the U-Net has weights that `optimize` made, and `what` cannot be done with it."""
        if self.unet is None:
            return
        if any(isinstance(module, Attention) and module.fused_projections for module in self.unet.modules()):
            raise ValueError(f"{what} needs the U-Net without fused projections: call unfuse_projections() first.")
        if _is_quantized(self.unet):
            raise ValueError(
                f"{what} needs the U-Net as it was before `optimize(quantization=...)`: load the pipeline again."
            )

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
            ValueError: If there are no LoRA weights of a U-Net, or `optimize` has changed it too much.
        """
        self.check_weights("LoRA")
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


def quantize_unet(unet: UNet2DConditionModel, quantization: str) -> None:
    """Has the linear layers of the transformer blocks compute in 8 bits, `"fp8"` or `"int8"`, by torchao.

    Raises:
        ImportError: If torchao is not installed.
        ValueError: If there is no such quantization, or not on this device, or the U-Net is quantized already.
    """
    if quantization not in _QUANTIZATIONS:
        raise ValueError(f"`quantization` must be one of {', '.join(_QUANTIZATIONS)}; got {quantization!r}.")
    if _is_quantized(unet):
        raise ValueError("The U-Net is quantized already: leave `quantization` out.")
    try:
        # By its name, or diffusers would ask everyone for it who loads this file as remote code.
        torchao: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ImportError(f"quantization={quantization!r} needs torchao: pip install torchao") from error
    if quantization == "fp8":
        _check_fp8(unet.device)
    layers = {
        id(layer)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear)
        and "transformer_blocks" in name
        and layer.in_features % _QUANTIZED_MULTIPLE == layer.out_features % _QUANTIZED_MULTIPLE == 0
    }
    config = getattr(torchao, _QUANTIZATIONS[quantization])()
    torchao.quantize_(unet, config, filter_fn=lambda layer, name: id(layer) in layers)


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise ValueError(
            f"quantization='fp8' needs a GPU that computes in it, such as Ada or Hopper (compute capability 8.9), but "
            f"the U-Net is on {device}. Move the pipeline there first, or use 'int8'."
        )


def _is_quantized(unet: UNet2DConditionModel) -> bool:
    """Whether weights were quantized after loading; what diffusers quantizes while loading it can save, too."""
    kinds = {type(parameter.data) for parameter in unet.parameters()}
    return getattr(unet, "hf_quantizer", None) is None and kinds != {torch.Tensor}
