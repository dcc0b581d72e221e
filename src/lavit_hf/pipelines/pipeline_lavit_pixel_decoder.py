"""Pixel decoder: a latent diffusion model that draws what visual codes stand for (LaVIT paper, section 3.3)."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from .pixel_decoder_storage import PixelDecoderStorage
from .unet_and_vae import WARM_UP_STEPS, UNetAndVaeMixin

logger = logging.get_logger(__name__)

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# The sizes (height, width) that the high-resolution decoder was published with.
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}
_PUBLISHED_SIZE = 1024
# Codes or ids: of several images, or of one.
RowsOfIds = torch.Tensor | Sequence[torch.Tensor | Sequence[int]] | Sequence[int]


def resolve_size(
    height: int | None, width: int | None, aspect_ratio: str | None, native_size: int, multiple: int
) -> tuple[int, int]:
    """Returns the height and width to draw, in pixels.

    Args:
        height: Requested height; `native_size` by default.
        width: Requested width; `native_size` by default.
        aspect_ratio: A key of `ASPECT_RATIOS` instead of both. At a native size of 1024 it stands for the published
            size, at another one for the same shape with as many pixels as a native square.
        native_size: Side of the square that the U-Net was made for.
        multiple: What a side has to be a multiple of.

    Raises:
        ValueError: If the size is none, or no multiple.
    """
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise ValueError("Give either `aspect_ratio` or `height` and `width`, not both.")
        if aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"`aspect_ratio` must be one of {', '.join(ASPECT_RATIOS)}; got {aspect_ratio!r}.")
        published = ASPECT_RATIOS[aspect_ratio]
        wanted = (side * native_size / _PUBLISHED_SIZE for side in published)
        height, width = (max(round(side / multiple), 1) * multiple for side in wanted)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (
            not isinstance(side, Integral) or isinstance(side, bool) or side < 1 or side % multiple
        ):
            raise ValueError(f"`{name}` must be a positive multiple of {multiple}; got {side!r}.")
    return int(height or native_size), int(width or native_size)


def rows_of_ids(values: Any, name: str) -> list[torch.Tensor]:
    """Brings codes or ids to one 1-D tensor per image, on the CPU.

    Args:
        values: A sequence of 1-D integer tensors or lists of integers, one per image; a 2-D tensor; or, for one image,
            a 1-D tensor or a flat list.
        name: What to call the argument in errors.

    Returns:
        Tensors of dtype `torch.long`.

    Raises:
        TypeError: If something is no sequence of integers.
        ValueError: If there are no images.
    """
    if isinstance(values, torch.Tensor) and values.ndim == 2:
        values = list(values)
    elif isinstance(values, torch.Tensor) or (is_sequence(values) and values and not any(map(_has_length, values))):
        values = [values]
    if not is_sequence(values):
        raise TypeError(f"`{name}` must be a list of 1-D integer tensors, one per image; got {type(values).__name__}.")
    if len(values) == 0:
        raise ValueError(f"`{name}` is empty: give one tensor of codes per image.")
    return [_as_integers(image, f"{name}[{index}]") for index, image in enumerate(values)]


def is_sequence(values: Any) -> bool:
    """Whether something is a list or the like, and no text."""
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def _has_length(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, torch.Tensor) else hasattr(value, "__len__")


def _as_integers(image: Any, name: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must hold integers; got {image!r:.80}.") from error
    if not isinstance(image, torch.Tensor) and tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers; got {tensor.dtype}.")
    if tensor.ndim != 1:
        raise TypeError(f"`{name}` must be 1-D; got the shape {list(tensor.shape)}.")
    return tensor.detach().cpu().long()


def codes_of_ids(
    input_ids: list[torch.Tensor], offset: int, codebook_size: int, eoi_token_id: int | None
) -> list[torch.Tensor]:
    """Takes the visual codes out of ids of the language model's vocabulary.

    Every id that is no code is dropped wherever it stands, as the original does: the prompt, image start and end,
    padding, and strays between codes.

    Args:
        input_ids: Ids of one image each, `[length]`.
        offset: Id of code 0.
        codebook_size: Number of codes.
        eoi_token_id: Id of image end. Codes that go on after it belong to another image, which is an error.

    Returns:
        Codes of every image.

    Raises:
        ValueError: If there are ids outside the vocabulary, or several images in a row.
    """
    return [
        _codes_of_row(ids, f"input_ids[{index}]", offset, codebook_size, eoi_token_id)
        for index, ids in enumerate(input_ids)
    ]


def _codes_of_row(
    ids: torch.Tensor, name: str, offset: int, codebook_size: int, eoi_token_id: int | None
) -> torch.Tensor:
    positions = ((ids >= offset) & (ids < offset + codebook_size)).nonzero()[:, 0]
    # After the last code come the placeholder of continuous features and tokens that users added. Both may stand in a
    # prompt, but not in an image: there, or without one, they tell of another vocabulary.
    inner = ids[positions[0] : positions[-1]] if len(positions) else ids
    outside = torch.cat([ids[ids < 0], inner[inner > offset + codebook_size]])
    if len(outside):
        raise ValueError(
            f"`{name}` holds the id {outside[0].item()}; ids go from 0 to {offset + codebook_size} in this vocabulary."
        )
    if len(positions) and eoi_token_id is not None and (inner == eoi_token_id).any():
        raise ValueError(
            f"`{name}` holds several images: codes go on after the image end ({eoi_token_id}). Pass one row per "
            "image, without the images of the prompt."
        )
    return ids[positions] - offset


def check_codes(codes: list[torch.Tensor], codebook_size: int, max_codes: int) -> None:
    """Refuses codes that the token decoder has no row or no position for."""
    for index, image in enumerate(codes):
        if len(image) > max_codes:
            raise ValueError(f"Image {index} has {len(image)} codes; an image has at most {max_codes}.")
        outside = image[(image < 0) | (image >= codebook_size)]
        if len(outside):
            raise ValueError(
                f"Image {index} has the code {outside[0].item()}; codes go from 0 to {codebook_size - 1}. (Ids of the "
                "language model's vocabulary are passed as `input_ids`.)"
            )


@dataclass
class LavitPixelDecoderPipelineOutput(BaseOutput):
    """Output of a pixel decoder.

    Args:
        images: A list of PIL images; for `output_type="np"` an array `[images, height, width, 3]` and for `"pt"` a
            tensor `[images, 3, height, width]`, both in [0, 1]; for `"latent"` the latents `[images, 4, height / 8,
            width / 8]`.
        nsfw_content_detected: Per image, whether the safety checker blackened it; `None` without a safety checker.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None


class LavitPixelDecoderPipeline(PixelDecoderStorage, UNetAndVaeMixin):
    r"""Draws images from visual codes, as LaVIT writes them.

    Both decoders of the original are this class. The high-resolution one is an SDXL U-Net with a pooled condition
    (1024 x 1024 and five other shapes), the low-resolution one a Stable Diffusion 1.5 U-Net (512 x 512).

    Args:
        token_decoder: A [`LavitTokenDecoder`], which turns codes into conditions of the U-Net.
        unet: Denoises latents under these conditions.
        vae: Turns latents into pixels.
        scheduler: Any scheduler of diffusers; the original uses [`~diffusers.DDIMScheduler`].
        safety_checker: Blackens images it takes offense at.
        feature_extractor: Prepares images for the safety checker.
        visual_token_offset: Id of code 0 in the language model's vocabulary, needed for `input_ids`.
        eoi_token_id: Id of image end there.

    Example:

    ```python
    >>> import torch
    >>> from lavit_hf.pipelines import LavitPixelDecoderPipeline

    >>> pipeline = LavitPixelDecoderPipeline.from_pretrained("checkpoints/lavit-tiny-random")
    >>> codes = torch.tensor([3, 14, 15, 9, 26])
    >>> image = pipeline([codes], num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    >>> image.size
    (64, 64)
    ```
    """

    model_cpu_offload_seq = "token_decoder->unet->vae"  # type: ignore[assignment]  # declared as None
    _optional_components = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    # Called as in the pipelines of Stable Diffusion, so that diffusers' own callbacks work.
    _callback_tensor_inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]

    def __init__(
        self,
        token_decoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: ImageProcessingMixin | None = None,
        visual_token_offset: int | None = None,
        eoi_token_id: int | None = None,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("A safety checker needs a feature extractor.")
        self.register_modules(
            token_decoder=token_decoder,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(visual_token_offset=visual_token_offset, eoi_token_id=eoi_token_id)
        _check_fit(token_decoder, unet, vae)
        _check_id_range(token_decoder, visual_token_offset, eoi_token_id)
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def is_highres(self) -> bool:
        """Whether this is the high-resolution decoder, whose U-Net takes a pooled condition and sizes."""
        return self.unet.config["addition_embed_type"] == "text_time"

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        codes: RowsOfIds | None = None,
        *,
        input_ids: RowsOfIds | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LavitPixelDecoderPipelineOutput | tuple:
        r"""Draws images.

        Args:
            codes: One 1-D integer tensor of codes in `[0, codebook_size)` per image. An image without codes is drawn
                from what the token decoder makes of padding.
            input_ids: Instead of `codes`: ids of the language model's vocabulary, `[batch, length]` or one 1-D tensor
                per image, as `generate` returns them. Every id that is no code is dropped, as the original does: the
                prompt, image start and end, padding, and strays between codes. Codes after an image end are an error.
            height: Height in pixels, a multiple of 8; by default that of the U-Net (1024, low resolution 512).
            width: Width in pixels.
            aspect_ratio: Instead of both: `"1:1"`, `"4:3"`, `"3:2"`, `"16:9"`, `"2:3"` or `"3:4"`, the published sizes
                of the high-resolution decoder.
            num_inference_steps: Denoising steps; by default 25, low resolution 50.
            guidance_scale: How much the condition is stressed; by default as the token decoder's configuration says
                (`default_guidance_scale`), or 7, low resolution 5. Up to 1, guidance is off and every step costs half.
            num_images_per_prompt: Images to draw per image in `codes`.
            generator: One source of noise for all images, or a list with one per image to draw. With a list, an image
                does not depend on what is drawn along with it.
            latents: Initial noise instead, `[images, 4, height / 8, width / 8]`.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Whether to return an output object instead of a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; the tensors
                it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `latents`, `prompt_embeds` (the condition),
                `add_text_embeds` (the pooled one), `add_time_ids`.

        Returns:
            [`LavitPixelDecoderPipelineOutput`], or a tuple of the images and what the safety checker detected.

        Raises:
            TypeError: If codes are no integers.
            ValueError: If an argument is out of range.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs, and set what is not given
        images = self._resolve_codes(codes, input_ids)
        height, width = self.resolve_size(height, width, aspect_ratio)
        if num_inference_steps is None:
            num_inference_steps = self._default_steps
        if guidance_scale is None:
            stored = self.token_decoder.config.default_guidance_scale
            guidance_scale = stored if stored is not None else 7.0 if self.is_highres else 5.0
        self.check_inputs(
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device
        batch_size = len(images) * num_images_per_prompt

        # 2. Draw the initial noise: nothing is computed yet when it does not fit
        noisy = self.prepare_latents(batch_size, height, width, device, generator, latents)

        # 3. Decode the codes to conditions
        prompt_embeds, add_text_embeds, negative_mask = self.encode_codes(images, num_images_per_prompt, device)
        add_time_ids = self._time_ids(height, width, len(prompt_embeds), device) if self.is_highres else None

        # 4. Prepare timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        if hasattr(self.scheduler, "set_begin_index"):  # spares the scheduler a search that waits for the GPU
            self.scheduler.set_begin_index(0)
        noisy = noisy * self.scheduler.init_noise_sigma
        self._num_timesteps = len(timesteps)

        # 5. Denoise
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                noise = self._predict_noise(
                    noisy, timestep, prompt_embeds, add_text_embeds, add_time_ids, negative_mask
                )
                noisy = self._step(noise, timestep, noisy, generator)
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": noisy,
                        "prompt_embeds": prompt_embeds,
                        "add_text_embeds": add_text_embeds,
                        "add_time_ids": add_time_ids,
                    }
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors.update(callback_on_step_end(self, step, timestep, wanted) or {})
                    noisy, prompt_embeds = tensors["latents"], tensors["prompt_embeds"]
                    add_text_embeds, add_time_ids = tensors["add_text_embeds"], tensors["add_time_ids"]
                progress_bar.update()

        # 6. Decode the latents to pixels
        flagged = None
        result: Any = noisy
        if output_type != "latent":
            pixels, flagged = self.run_safety_checker(self.decode_latents(noisy))
            denormalize = None if flagged is None else [not is_flagged for is_flagged in flagged]  # black is 0 already
            result = self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize)

        # 7. Offload all models
        self.maybe_free_model_hooks()
        if not return_dict:
            return result, flagged
        return LavitPixelDecoderPipelineOutput(images=result, nsfw_content_detected=flagged)

    def check_inputs(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Checks what is neither codes, nor a size, nor noise; arguments as in `__call__`."""
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
        most = self.scheduler.config.num_train_timesteps
        if num_inference_steps > most:
            raise ValueError(f"`num_inference_steps` is at most {most}; got {num_inference_steps}.")
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number; got {guidance_scale!r}.")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(_OUTPUT_TYPES)}; got {output_type!r}.")
        if unknown := [n for n in callback_on_step_end_tensor_inputs if n not in self._callback_tensor_inputs]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {', '.join(self._callback_tensor_inputs)}; got "
                f"{', '.join(map(repr, unknown))}."
            )

    def check_call(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Checks the arguments of a call before there are codes to draw, which may take long to make.

        Args:
            num_images: Images to draw; the other arguments are those of `__call__`.
            generator: As in `__call__`, like all that follows.

        Raises:
            TypeError: If the latents are no floats.
            ValueError: If an argument is out of range.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height, width = self.resolve_size(height, width, aspect_ratio)
        steps = self._default_steps if num_inference_steps is None else num_inference_steps
        scale = 1.0 if guidance_scale is None else guidance_scale
        self.check_inputs(steps, scale, num_images, output_type, callback_on_step_end_tensor_inputs)
        self._check_latents(latents, self._latents_shape(num_images, height, width), generator)

    @property
    def _default_steps(self) -> int:
        return 25 if self.is_highres else 50

    def resolve_size(
        self, height: int | None = None, width: int | None = None, aspect_ratio: str | None = None
    ) -> tuple[int, int]:
        """Height and width that a call with these arguments draws, in pixels; see `__call__`."""
        side = self.unet.config["sample_size"]
        native_size = (side if isinstance(side, int) else max(side)) * self.vae_scale_factor
        return resolve_size(height, width, aspect_ratio, native_size, self.vae_scale_factor)

    def _resolve_codes(self, codes: RowsOfIds | None, input_ids: RowsOfIds | None) -> list[torch.Tensor]:
        """The codes of every image, checked."""
        config = self.token_decoder.config
        if (codes is None) == (input_ids is None):
            raise ValueError("Give either `codes` or `input_ids`.")
        if codes is not None:
            images = rows_of_ids(codes, "codes")
        elif self.config["visual_token_offset"] is None:
            raise ValueError(
                "This pipeline does not know the ids of visual codes (`visual_token_offset`): pass `codes`."
            )
        else:
            images = codes_of_ids(
                rows_of_ids(input_ids, "input_ids"),
                self.config["visual_token_offset"],
                config.codebook_size,
                self.config["eoi_token_id"],
            )
        check_codes(images, config.codebook_size, config.num_queries)
        if empty := [str(index) for index, image in enumerate(images) if len(image) == 0]:
            logger.warning(f"There are no codes to draw image {', '.join(empty)} from.")
        return images

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Draws the initial noise, or checks the given one: `[batch, channels, height / 8, width / 8]`, fp32.

        Noise and latents are fp32 whatever the U-Net's dtype, so that half precision starts from the same noise.
        """
        shape = self._latents_shape(batch_size, height, width)
        self._check_latents(latents, shape, generator)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32)

    def _latents_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (batch_size, self.unet.config["in_channels"], height // factor, width // factor)

    @staticmethod
    def _check_latents(latents: Any, shape: tuple[int, ...], generator: Any) -> None:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"Got {len(generator)} generators for {shape[0]} images.")
        if latents is None:
            return
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            raise TypeError(f"`latents` must be a tensor of floats; got {getattr(latents, 'dtype', type(latents))}.")
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {list(shape)}; got {list(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` must be finite; they hold NaN or infinity.")

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        self.check_weights("Saving")
        super()._save(save_directory, *args, **kwargs)

    def _warm_up(self, batch_size: int, **size: Any) -> None:
        options: dict[str, Any] = {"num_inference_steps": WARM_UP_STEPS, "output_type": "pt", **size}
        generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
        self._draw_in_memory(lambda: self([[0]] * batch_size, generator=generator, **options))

    def encode_codes(
        self, images: list[torch.Tensor], num_images_per_prompt: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Decodes codes to the conditions of the U-Net.

        Args:
            images: Codes of every image, `[codes]`.
            num_images_per_prompt: How often to repeat each.
            device: Where to.

        Returns:
            Conditions `[rows, tokens, width]`, pooled conditions `[rows, pooled width]` or `None`, and the mask of the
            negative condition's tokens, `[batch, tokens]` or `None`. With guidance the rows are the negative half
            followed by the other one, else only the latter.
        """
        output = self.token_decoder(torch.cat(images).to(device), [len(image) for image in images])
        parts = {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in output.items()}
        condition, pooled = parts["condition"], parts.get("pooled_condition")
        if self.do_classifier_free_guidance:
            condition = torch.cat([parts["negative_condition"], condition])
            pooled = torch.cat([torch.zeros_like(pooled), pooled]) if pooled is not None else None
        dtype = self.unet.dtype
        pooled = pooled.to(dtype) if pooled is not None else None
        return condition.to(dtype), pooled, parts.get("negative_attention_mask")

    def _time_ids(self, height: int, width: int, rows: int, device: torch.device) -> torch.Tensor:
        """What SDXL is told about sizes: that of the picture, no crop, and that to draw. `[rows, 6]`, fp32."""
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device)
        return ids.expand(rows, -1)

    def _predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        add_text_embeds: torch.Tensor | None,
        add_time_ids: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predicts the noise in the latents, `[batch, channels, height / 8, width / 8]`, guided."""
        is_guided = self.do_classifier_free_guidance
        inputs = self.scheduler.scale_model_input(torch.cat([latents] * 2) if is_guided else latents, timestep)
        options: dict[str, Any] = {}
        if is_guided and negative_mask is not None:
            options["encoder_attention_mask"] = torch.cat([negative_mask, torch.ones_like(negative_mask)])
        if self.is_highres:
            options["added_cond_kwargs"] = {"text_embeds": add_text_embeds, "time_ids": add_time_ids}
        (noise,) = self.unet(
            inputs.to(self.unet.dtype), timestep, encoder_hidden_states=prompt_embeds, return_dict=False, **options
        )
        noise = noise.to(torch.float32, copy=True)  # CUDA graphs write the next one to the same place
        if is_guided:
            negative, positive = noise.chunk(2)
            noise = negative + self.guidance_scale * (positive - negative)
        return noise

    def _step(
        self,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        return self.scheduler.step(noise, timestep, latents, return_dict=False, **options)[0]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to pixels in about [-1, 1], `[batch, 3, height, width]`.

        A VAE that would overflow in fp16 decodes in fp32.
        """
        needs_upcasting = self.vae.dtype == torch.float16 and self.vae.config["force_upcast"]
        if needs_upcasting:
            self.vae.to(dtype=torch.float32)  # type: ignore[call-arg]  # its wrapper hides self
        try:
            latents = latents / self.vae.config["scaling_factor"]
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        finally:
            if needs_upcasting:
                self.vae.to(dtype=torch.float16)  # type: ignore[call-arg]

    def run_safety_checker(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Blackens what the safety checker detects, `[batch, 3, height, width]`, and says where it did."""
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        inputs = self.feature_extractor(pictures, return_tensors="pt").to(pixels.device)
        clip_input = inputs.pixel_values.to(self.safety_checker.dtype)
        pixels, flagged = self.safety_checker(images=pixels, clip_input=clip_input)
        return pixels, [bool(is_flagged) for is_flagged in flagged]


def _check_id_range(token_decoder: Any, visual_token_offset: int | None, eoi_token_id: int | None) -> None:
    """Refuses ids of which text, or the image end, would be taken for codes."""
    if visual_token_offset is None:
        return
    end = visual_token_offset + (token_decoder.config.codebook_size if token_decoder is not None else 1)
    if visual_token_offset < 0 or (eoi_token_id is not None and visual_token_offset <= eoi_token_id < end):
        raise ValueError(
            f"Codes have the ids {visual_token_offset} to {end - 1} by `visual_token_offset`, so the image end "
            f"cannot have the id {eoi_token_id} (`eoi_token_id`)."
        )


def _check_fit(token_decoder: Any, unet: Any, vae: Any) -> None:
    """Refuses a token decoder, a U-Net and a VAE of different decoders."""
    if token_decoder is None or unet is None:
        return
    if vae is not None and vae.config.latent_channels != unet.config.in_channels:
        raise ValueError(
            f"The U-Net denoises {unet.config.in_channels} channels, but the VAE decodes "
            f"{vae.config.latent_channels}: they belong to different pixel decoders."
        )
    decoder, widths = token_decoder.config, unet.config.cross_attention_dim  # one, or one per block
    width = widths if isinstance(widths, int) else max(widths)
    if sum(decoder.cross_attention_dims) != width:
        raise ValueError(
            f"The token decoder makes conditions of width {sum(decoder.cross_attention_dims)}, but the U-Net takes "
            f"{width}: they belong to different pixel decoders."
        )
    takes_pooled = unet.config.addition_embed_type == "text_time"
    if takes_pooled != (decoder.pooled_size is not None):
        raise ValueError(
            f"The U-Net takes {'a' if takes_pooled else 'no'} pooled condition, but the token decoder makes "
            f"{'none' if takes_pooled else 'one'}: they belong to different pixel decoders."
        )
