"""From prompts to pictures in one call: the language model writes visual codes, a pixel decoder draws them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch.nn import functional as F
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from ..modeling.checkpoint_files import find_safetensors
from ..modeling.modeling_lavit import LavitForConditionalGeneration
from ..processing.image_budgets import assign_log_prior
from ..processing.image_processing_pil_lavit import Images, check_images, flatten, prepare_array
from ..processing.processing_lavit import ImageTextProcessor
from ..utils.progress import TokenProgress
from .overlap import can_overlap, write_and_draw
from .pipeline_lavit_pixel_decoder import LavitPixelDecoderPipeline, codes_of_ids, is_sequence
from .pixel_decoder_storage import COMPONENTS, HUB_OPTIONS, code_for, keep_config, save_and_push
from .text_to_image_loading import TEXT_TO_IMAGE, check_codebooks, language_model_classes, load_beside
from .unet_and_vae import UNetAndVaeMixin

logger = logging.get_logger(__name__)

# Arguments of diffusers that models of transformers take as well. (They need no `low_cpu_mem_usage`.)
_MODEL_OPTIONS = ("variant", "device_map", "max_memory", "offload_folder", "use_safetensors", "disable_mmap")

# What the original draws with (LaVIT paper, appendix; its own scripts).
_TEXT_GUIDANCE, _IMAGE_GUIDANCE = 4.0, 5.0
_MIN_CODES, _MAX_CODES = 20, 200
_WARM_UP_CODES = 4
# What a checkpoint may have for its texts alone.
NOT_OF_DRAWING: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_IMAGE_TYPES = (PIL.Image.Image, np.ndarray, torch.Tensor)
PromptPart = str | PIL.Image.Image | np.ndarray | torch.Tensor
Prompts = PromptPart | Sequence[PromptPart | Sequence[PromptPart]]


def split_prompts(prompt: Any, image_token: str) -> tuple[list[str], list[list[Any]]]:
    """Brings prompts to texts with placeholders, and the images of each.

    Args:
        prompt: A text; a list of texts and images, which is one prompt; or a list of prompts. A list of nothing but
            texts is a list of prompts.
        image_token: Placeholder to put where an image goes.

    Returns:
        Texts, and one list of images per text.

    Raises:
        TypeError: If something is neither text nor image.
        ValueError: If there is no prompt, or a text holds the placeholder.
    """
    is_one = isinstance(prompt, str) or (
        is_sequence(prompt) and any(isinstance(part, _IMAGE_TYPES) for part in prompt)
    )
    if isinstance(prompt, _IMAGE_TYPES):
        prompt, is_one = [prompt], True
    if not is_one and not is_sequence(prompt):
        raise TypeError(
            f"`prompt` must be a text, a list of texts and PIL images, or a list of prompts; got {_name(prompt)}."
        )
    prompts = [prompt] if is_one else list(prompt)
    if not prompts:
        raise ValueError("`prompt` is empty: give at least one prompt (which may be an empty text).")
    parts = [[one] if isinstance(one, str) else one for one in prompts]
    texts = [_join(one, f"prompt[{index}]", image_token) for index, one in enumerate(parts)]
    return texts, [[part for part in one if not isinstance(part, str)] for one in parts]


def _join(parts: Any, name: str, image_token: str) -> str:
    if not is_sequence(parts) or not parts:
        raise TypeError(f"`{name}` must be a text or a list of texts and PIL images; got {_name(parts)}.")
    for part in parts:
        if not isinstance(part, (str, *_IMAGE_TYPES)):
            raise TypeError(f"`{name}` must hold texts and PIL images; got {_name(part)}.")
        if isinstance(part, str) and image_token in part:
            raise ValueError(
                f"`{name}` holds the text {image_token!r}, which stands for an image; pass a list with the image in "
                "its place."
            )
    return "".join(part if isinstance(part, str) else image_token for part in parts)


def _name(value: Any) -> str:
    return "an empty list" if is_sequence(value) and not value else type(value).__name__


def original_pixel_values(images: Any, image_processor: Any) -> torch.Tensor:
    """Preprocesses pictures as the original does before it reconstructs them.

    There a tensor in [0, 1] is interpolated without antialiasing, which differs from what the image processor makes of
    a PIL image.

    Args:
        images: One picture or several: PIL images, arrays, tensors, paths or URLs. Floats are in [0, 1].
        image_processor: Its size, mean and standard deviation are used.

    Returns:
        `[images, 3, height, width]`.

    Raises:
        ValueError: If something is no picture.
    """
    size = (image_processor.size["height"], image_processor.size["width"])
    pictures = (_to_unit_range(image) for image in flatten(check_images(images)))
    resized = [F.interpolate(one[None], size, mode="bicubic", align_corners=False) for one in pictures]
    pixels = torch.cat(resized)
    if not image_processor.do_normalize:
        return pixels
    statistics = (image_processor.image_mean, image_processor.image_std)  # numbers, or one for each channel
    mean, std = (torch.tensor(one, dtype=torch.float32).reshape(-1, 1, 1) for one in statistics)
    return (pixels - mean) / std


def _to_unit_range(image: Any) -> torch.Tensor:
    """`[3, height, width]` in [0, 1]."""
    array = prepare_array(image, do_convert_rgb=True, input_data_format=None, do_rescale=False)
    if array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.float32) / 255)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"A picture of floats must be in [0, 1]; got a range of {array.min()} to {array.max()}.")
    return torch.from_numpy(array.astype(np.float32))


@dataclass
class LavitTextToImagePipelineOutput(BaseOutput):
    """Output of [`LavitTextToImagePipeline`].

    Args:
        images: As in [`LavitPixelDecoderPipelineOutput`], by `output_type`.
        codes: The visual codes that each image was drawn from, `[codes]` per image.
        nsfw_content_detected: Per image, whether the safety checker blackened it; `None` without a safety checker.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    codes: list[torch.Tensor]
    nsfw_content_detected: list[bool] | None


class LavitTextToImagePipeline(DiffusionPipeline, UNetAndVaeMixin):
    r"""Draws pictures from prompts of text and images, and reconstructs pictures from their own tokens.

    Args:
        model: A [`LavitForConditionalGeneration`]; `None` for the one beside the pixel decoder, in the U-Net's dtype.
        processor: Its [`ImageTextProcessor`], which needs no visual tokenizer of its own; `None` likewise.
        token_decoder: This and what follows are the components of a [`LavitPixelDecoderPipeline`].
        unet: See there.
        vae: See there.
        scheduler: See there.
        safety_checker: See there.
        feature_extractor: See there.
        visual_token_offset: Of a pixel decoder (`**pixel_decoder.components`); it must be the model's.
        eoi_token_id: Likewise.

    Example:

    ```python
    >>> import torch
    >>> from lavit_hf.pipelines import LavitTextToImagePipeline

    >>> pipeline = LavitTextToImagePipeline.from_pretrained("checkpoints/lavit-tiny-random")
    >>> generator = torch.Generator().manual_seed(0)
    >>> image = pipeline("a cat on a red chair", num_inference_steps=4, generator=generator).images[0]
    >>> image.size
    (64, 64)
    ```
    """

    model_cpu_offload_seq = "model->token_decoder->unet->vae"  # type: ignore[assignment]  # declared as None
    # The first two, `DiffusionPipeline.from_pretrained` hands over as `None`.
    _optional_components = ["model", "processor", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = LavitPixelDecoderPipeline._callback_tensor_inputs

    def __init__(
        self,
        model: LavitForConditionalGeneration | None,
        processor: ImageTextProcessor | None,
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
        if model is None or processor is None:
            model, processor = load_beside(token_decoder, unet, model, processor)
        _check_parts(model, processor, token_decoder, visual_token_offset, eoi_token_id)
        self.register_modules(
            model=model,
            processor=processor,
            token_decoder=token_decoder,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, decoder: str | None = None, **kwargs: Any
    ) -> Self:
        """Loads everything from one LaVIT directory or repository.

        Args:
            pretrained_model_name_or_path: A directory with a LaVIT and its pixel decoders, or a repository of the Hub.
            decoder: `"highres"` (default) or `"lowres"`, see [`LavitPixelDecoderPipeline.from_pretrained`].
            **kwargs: As for any pipeline of diffusers, for the language model as for the others: `dtype` (one, or one
                per component), `variant`, `device_map`, `use_safetensors`, `revision`, ...; or components that are
                loaded already, such as `model`.

        Returns:
            The pipeline.

        Raises:
            OSError: If the model, the processor or the pixel decoder is not there.
            ValueError: If they do not fit together.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if (dtype := kwargs.pop("torch_dtype", None)) is not None:
            kwargs.setdefault("dtype", dtype)
        located = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        model, processor = kwargs.pop("model", None), kwargs.pop("processor", None)
        model_class, processor_class = language_model_classes()
        quantization = kwargs.get("quantization_config") if model is None else None
        if quantization is not None and _covers_language_model(quantization):
            raise ValueError(
                "The language model needs a quantization of its own. Name the components: "
                'PipelineQuantizationConfig(quant_mapping={"model": ..., "unet": ...}), with a configuration of '
                "transformers for the model and one of diffusers for the U-Net."
            )
        if processor is None:
            processor = processor_class.from_pretrained(source, **located)
        pixel_decoder = LavitPixelDecoderPipeline.from_pretrained(source, decoder=decoder, **kwargs)
        if model is None:
            options = {name: kwargs[name] for name in _MODEL_OPTIONS if kwargs.get(name) is not None}
            if isinstance(dtype := kwargs.get("dtype"), dict):
                dtype = dtype.get("model", dtype.get("default", torch.float32))  # as for the other components
            if dtype is not None:
                options["dtype"] = dtype
            if "variant" in options and not find_safetensors(source, options["variant"], located):
                logger.warning(f"{source} has no language model of the variant {options.pop('variant')}.")
            if quantization is not None:
                options["quantization_config"] = (quantization.quant_mapping or {}).get("model")
            model = model_class.from_pretrained(source, **located, **options)
        check_codebooks(source, model, pixel_decoder.token_decoder)
        components = {name: getattr(pixel_decoder, name) for name in COMPONENTS}
        pipeline = cls(model, processor, **components)
        pipeline.register_to_config(_name_or_path=source)
        if kwargs.get("device_map") is not None:
            placed = pixel_decoder.hf_device_map
            everything = {**placed, "model": model.device} if isinstance(placed, dict) else placed
            pipeline.hf_device_map = everything  # type: ignore[assignment]  # declared as None
        return pipeline

    def save_pretrained(  # type: ignore[override]  # what is not named here is in `kwargs`
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves model, processor and pixel decoder into one directory, from which each of them loads, too.

        Args:
            save_directory: Where to; created if needed.
            safe_serialization: Whether U-Net and VAE become safetensors or pickles; the models of transformers are
                always saved as safetensors.
            variant: Goes into the names of all weights (`model.fp16.safetensors`), beside which those of others stay.
            max_shard_size: Largest size of a file of weights, such as `"5GB"`.
            push_to_hub: Whether to upload it as well; of the directory nothing else.
            **kwargs: As for [`LavitPixelDecoderPipeline.save_pretrained`].
        """
        if max_shard_size is not None:
            kwargs["max_shard_size"] = max_shard_size
        kwargs |= {"safe_serialization": safe_serialization, "variant": variant}
        save_and_push(self._save, save_directory, push_to_hub=push_to_hub, **kwargs)

    def _save(self, save_directory: str | os.PathLike[str], variant: str | None, **kwargs: Any) -> None:
        self.check_weights("Saving")
        sharding = {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
        with keep_config(Path(save_directory), variant):
            self.model.save_pretrained(save_directory, variant=variant, **sharding)
        self.processor.save_pretrained(save_directory)
        code = code_for(type(self), "text_to_image_code")
        (Path(save_directory) / f"{TEXT_TO_IMAGE[0]}.py").write_text(code, encoding="utf-8")
        pixel_decoder = self.pixel_decoder
        pixel_decoder._named_pipeline = TEXT_TO_IMAGE
        pixel_decoder._save(save_directory, variant=variant, **kwargs)

    @property
    def pixel_decoder(self) -> LavitPixelDecoderPipeline:
        """The second half as a pipeline of its own, of the same components."""
        decoder = LavitPixelDecoderPipeline(
            **{name: getattr(self, name) for name in COMPONENTS},
            visual_token_offset=self.model.config.visual_token_offset,
            eoi_token_id=self.model.config.eoi_token_id,
        )
        decoder.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return decoder

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        decoder_guidance_scale: float | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        min_new_tokens: int | None = None,
        max_new_tokens: int | None = None,
        image_end_bias: float | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        num_image_tokens: int | Sequence[int] | None = None,
        regions: Any = None,
        region_weight: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LavitTextToImagePipelineOutput | tuple:
        r"""Draws pictures from prompts. The defaults are those of the original.

        Args:
            prompt: A text; a list of texts and PIL images in any order, which is one prompt (`[image, "this cat on a
                beach"]`); or a list of prompts. An empty text draws without a prompt.
            negative_prompt: What guidance leads away from, one or one per prompt; by default no prompt at all.
            height: Height in pixels, see [`LavitPixelDecoderPipeline`].
            width: Width in pixels.
            aspect_ratio: Instead of both, such as `"16:9"`.
            num_inference_steps: Denoising steps.
            guidance_scale: How much the prompt is stressed when the codes are written; 1 turns guidance off. The
                default is the model's `generation_config.drawing_guidance_scale`; if it has none, 4, and 5 if there
                are images in a prompt.
            decoder_guidance_scale: How much the codes are stressed when pixels are drawn; by default the pixel
                decoder's own.
            do_sample: Whether to draw codes at random; the likeliest ones otherwise.
            temperature: Of sampling.
            top_k: Sample from this many likeliest codes; 0 for all.
            top_p: Sample from the likeliest codes with this probability together.
            min_new_tokens: Fewest codes of an image; by default 20, or 1 if the pixel decoder takes fewer than 200.
            max_new_tokens: Most codes of an image; by default 200, or as many as the pixel decoder takes.
            image_end_bias: Added to the score of the image end, of all prompts or of each: above 0 images get fewer
                codes, below 0 more.
            num_images_per_prompt: Images to draw per prompt.
            batch_size: Prompts at a time, by default all. On a GPU, codes of the next ones are written while the
                pixels of the last are drawn, if every image has a generator of its own; but not with
                `callback_on_step_end`, offloading, autocast, or after `optimize(compile="whole")`. Images in prompts
                become tokens all at once, before.
            num_image_tokens: How many codes an image in a prompt becomes, all or each; by default the visual tokenizer
                decides.
            regions: Where in the images of prompts codes are worth more, see [`ImageTextProcessor`].
            region_weight: How much more.
            generator: One source of randomness, for codes and noise, or a list with one per image to draw. With a
                list, an image does not depend on what is drawn along with it.
            latents: Initial noise, see [`LavitPixelDecoderPipeline`].
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Whether to return an output object instead of a tuple.
            callback_on_step_end: Called after every denoising step, with the pixel decoder's pipeline.
            callback_on_step_end_tensor_inputs: Which tensors it gets.

        Returns:
            [`LavitTextToImagePipelineOutput`], or a tuple of its fields.

        Raises:
            TypeError: If a prompt is neither text nor image.
            ValueError: If an argument is out of range.
        """
        # 1. Check inputs, and set what is not given
        texts, images = split_prompts(prompt, self.processor.image_token)
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale(any(images))
        least, most = self.default_lengths
        max_new_tokens = most if max_new_tokens is None else max_new_tokens
        min_new_tokens = min(least, max_new_tokens) if min_new_tokens is None else min_new_tokens
        num_images = len(texts) * num_images_per_prompt
        self.check_inputs(guidance_scale, min_new_tokens, max_new_tokens, negative_prompt)
        batches = _batches(len(texts), batch_size)
        per_prompt: dict[str, Any] = {"negative_prompt": negative_prompt, "image_end_bias": image_end_bias}
        for name, values in per_prompt.items():
            if len(batches) > 1 and np.ndim(values) > 0 and len(values) not in (1, len(texts)):
                raise ValueError(f"Got {len(values)} values of `{name}` for {len(texts)} prompts.")
        drawing: dict[str, Any] = {
            "height": height,
            "width": width,
            "aspect_ratio": aspect_ratio,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": decoder_guidance_scale,
            "latents": latents,
            "output_type": output_type,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        pixel_decoder = self.pixel_decoder
        pixel_decoder.check_call(num_images, generator, **drawing)

        # 2. Prepare the prompts
        negative_prompt = negative_prompt if guidance_scale != 1 else None
        inputs = self.encode_prompt(texts, images, negative_prompt, num_image_tokens, regions, region_weight)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {}
        sampling = {name: value.item() if isinstance(value, np.generic) else value for name, value in sampling.items()}

        # 3. Write visual codes, batch by batch, and draw them
        def write(prompts: slice) -> tuple[slice, list[torch.Tensor]]:
            drawn = slice(prompts.start * num_images_per_prompt, prompts.stop * num_images_per_prompt)
            codes = self.generate_codes(
                _rows(inputs, prompts),
                guidance_scale=guidance_scale,
                min_new_tokens=int(min_new_tokens),  # `generate` takes no numbers of NumPy
                max_new_tokens=int(max_new_tokens),
                image_end_bias=_part(image_end_bias, prompts),
                num_return_sequences=num_images_per_prompt,
                do_sample=do_sample,
                generator=_part(generator, drawn),
                **sampling,
            )
            return drawn, codes

        def draw(written: tuple[slice, list[torch.Tensor]]) -> LavitTextToImagePipelineOutput:
            drawn, codes = written
            own = {"generator": _part(generator, drawn), "latents": _part(latents, drawn)}
            return _output(pixel_decoder(codes, **{**drawing, **own}), codes)

        has_own_generators = isinstance(generator, list) and len(set(map(id, generator))) == num_images
        # Each thread would record CUDA graphs of its own.
        is_whole = getattr(self.unet, "_compiled_call_impl", None) is not None
        is_independent = has_own_generators and callback_on_step_end is None and not is_whole
        parts = (self.model, self.token_decoder, self.unet, self.vae)
        overlaps = len(batches) > 1 and is_independent and can_overlap(*parts)
        outputs = write_and_draw(batches, write, draw, self.model.device if overlaps else None)

        # 4. Offload all models
        self.maybe_free_model_hooks()
        return _as_asked(_joined(outputs), return_dict)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Images,
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        num_image_tokens: int | Sequence[int] | None = None,
        regions: Any = None,
        region_weight: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LavitTextToImagePipelineOutput | tuple:
        """Turns pictures into tokens and draws these: what the visual vocabulary keeps of them.

        Defaults and preprocessing are those of the original. The language model is not asked.

        Args:
            images: One picture or several: PIL images, arrays, tensors, paths or URLs.
            height: Height in pixels, see [`LavitPixelDecoderPipeline`].
            width: Width in pixels.
            aspect_ratio: Instead of both.
            num_inference_steps: Denoising steps.
            guidance_scale: How much the codes are stressed; by default as the token decoder's configuration says,
                or 5.
            num_image_tokens: How many codes a picture becomes, all or each; by default the visual tokenizer decides.
            regions: Where codes are worth more, see [`ImageTextProcessor`].
            region_weight: How much more.
            generator: One source of noise, or a list with one per picture.
            latents: Initial noise.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Whether to return an output object instead of a tuple.
            callback_on_step_end: As in `__call__`.
            callback_on_step_end_tensor_inputs: As in `__call__`.

        Returns:
            [`LavitTextToImagePipelineOutput`], or a tuple of its fields.
        """
        pixel_values = original_pixel_values(images, self.processor.image_processor)
        if guidance_scale is None:
            stored = self.token_decoder.config.default_guidance_scale
            guidance_scale = 5.0 if stored is None else stored
        drawing: dict[str, Any] = {
            "height": height,
            "width": width,
            "aspect_ratio": aspect_ratio,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "latents": latents,
            "output_type": output_type,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        pixel_decoder = self.pixel_decoder
        pixel_decoder.check_call(len(pixel_values), generator, **drawing)
        processor = self._processor_with_model()
        size, num_patches = processor.image_processor.size, self.model.config.visual_tokenizer_config.num_patches
        log_prior = assign_log_prior(flatten(images), regions, region_weight, size, num_patches)
        rows = processor.tokenize_pixels(pixel_values, num_tokens=num_image_tokens, log_prior=log_prior)
        codes = [torch.tensor(processor.tokenizer.convert_ids_to_codes(ids), dtype=torch.long) for ids in rows]
        output = _output(pixel_decoder(codes, generator=generator, **drawing), codes)
        self.maybe_free_model_hooks()
        return _as_asked(output, return_dict)

    def _warm_up(self, batch_size: int, **size: Any) -> None:
        """Writes a few codes, in a cache of the usual length, and draws with the pixel decoder."""
        _, most = self.default_lengths
        self.generate_codes(
            self.encode_prompt([""] * batch_size, [[]] * batch_size),
            guidance_scale=self.default_guidance_scale(has_images=False),
            max_new_tokens=most,
            max_drawn_tokens=min(most, _WARM_UP_CODES),
            do_sample=True,
            generator=torch.Generator().manual_seed(0),
        )
        self.pixel_decoder._warm_up(batch_size, **size)

    def default_guidance_scale(self, has_images: bool) -> float:
        """How much prompts with or without images are stressed if nothing is said."""
        default = _IMAGE_GUIDANCE if has_images else _TEXT_GUIDANCE
        stored = getattr(self.model.generation_config, "drawing_guidance_scale", None)
        return default if stored is None else stored

    def check_inputs(
        self, guidance_scale: float, min_new_tokens: int, max_new_tokens: int, negative_prompt: Any
    ) -> None:
        """Checks what concerns the writing of codes; the pixel decoder checks the rest."""
        if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"`guidance_scale` must be a finite number from 0 on; got {guidance_scale!r}.")
        limit = self.token_decoder.config.num_queries
        if not 0 <= min_new_tokens <= max_new_tokens or not 1 <= max_new_tokens <= limit:
            raise ValueError(
                f"`min_new_tokens` and `max_new_tokens` must be in order and at most {limit}, the most codes that the "
                f"pixel decoder takes; got {min_new_tokens} and {max_new_tokens}."
            )
        if negative_prompt is not None and not isinstance(negative_prompt, (str, list)):
            raise TypeError(
                f"`negative_prompt` must be a text or a list of texts; got {type(negative_prompt).__name__}."
            )

    @property
    def default_lengths(self) -> tuple[int, int]:
        """Fewest and most codes of an image: those of the original, where an image has 256 patches."""
        limit = self.token_decoder.config.num_queries
        return (_MIN_CODES, _MAX_CODES) if limit >= _MAX_CODES else (1, limit)

    def _processor_with_model(self) -> ImageTextProcessor:
        """The processor with the model's visual tokenizer; the caller's stays as it is."""
        processor = copy.copy(self.processor)
        processor.visual_tokenizer = self.model
        return processor

    def encode_prompt(
        self,
        texts: list[str],
        images: list[list[Any]],
        negative_prompt: str | list[str] | None = None,
        num_image_tokens: int | Sequence[int] | None = None,
        regions: Any = None,
        region_weight: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """Prepares prompts for `generate`.

        Args:
            texts: Prompts with a placeholder where an image goes.
            images: The images of each; they enter as codes alone, as in the original.
            negative_prompt: One, or one per prompt.
            num_image_tokens: How many codes an image becomes, all or each.
            regions: Where in the images codes are worth more.
            region_weight: How much more.

        Returns:
            `input_ids` and `attention_mask` [prompts, length], and `negative_prompt_ids` with their mask if there are
            any.
        """
        processor = self._processor_with_model()
        device = self._execution_device
        options: dict[str, Any] = {"generation_mode": "image", "padding": True, "return_tensors": "pt"}
        budget = {"num_image_tokens": num_image_tokens, "regions": regions, "region_weight": region_weight}
        if not any(images) and (given := [name for name, value in budget.items() if value is not None]):
            raise ValueError(f"`{given[0]}` is about images in prompts, and there are none.")
        pictures = {"images": images, **budget} if any(images) else {}
        inputs = dict(processor(text=texts, **pictures, **options).to(device))
        if negative_prompt is not None:
            negative = processor(text=negative_prompt, **options).to(device)
            inputs["negative_prompt_ids"] = negative["input_ids"]
            inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
        return inputs

    def generate_codes(self, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
        """Lets the language model write images.

        Args:
            inputs: From [`~LavitTextToImagePipeline.encode_prompt`].
            **kwargs: For [`LavitForConditionalGeneration.generate`].

        Returns:
            Codes of every image, `[codes]`.
        """
        with self.progress_bar(total=kwargs["max_new_tokens"]) as progress_bar:
            progress = StoppingCriteriaList([TokenProgress(progress_bar)])
            options = {**NOT_OF_DRAWING, **kwargs}
            output = self.model.generate(**inputs, generation_mode="image", stopping_criteria=progress, **options)
        new_ids = output[:, inputs["input_ids"].shape[1] :].cpu()
        config = self.model.config
        codebook_size = config.visual_tokenizer_config.codebook_size
        return codes_of_ids(list(new_ids), config.visual_token_offset, codebook_size, config.eoi_token_id)


def _batches(num_prompts: int, batch_size: int | None) -> list[slice]:
    """Which prompts are worked on together.

    Raises:
        ValueError: If the size of a batch is no positive integer.
    """
    if batch_size is None:
        return [slice(0, num_prompts)]
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer; got {batch_size!r}.")
    size = int(batch_size)
    return [slice(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]


def _part(values: Any, rows: slice) -> Any:
    """Those of some rows, if there is a value for each; a single value, or one for all, as it is."""
    return values if np.ndim(values) == 0 or len(values) == 1 else values[rows]


def _rows(inputs: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of what `generate` takes, padded no more than they would be alone."""
    part = {name: _part(values, rows) for name, values in inputs.items()}
    for name, mask in (("input_ids", "attention_mask"), ("negative_prompt_ids", "negative_prompt_attention_mask")):
        if name in part:
            is_used = part[mask].any(dim=0)
            part |= {name: part[name][:, is_used], mask: part[mask][:, is_used]}
    return part


def _output(drawn: Any, codes: list[torch.Tensor]) -> LavitTextToImagePipelineOutput:
    return LavitTextToImagePipelineOutput(
        images=drawn.images, codes=codes, nsfw_content_detected=drawn.nsfw_content_detected
    )


def _joined(outputs: list[LavitTextToImagePipelineOutput]) -> LavitTextToImagePipelineOutput:
    """Batches as one."""
    images: Any = [output.images for output in outputs]
    flagged = [is_flagged for output in outputs for is_flagged in output.nsfw_content_detected or ()]
    if isinstance(images[0], torch.Tensor):
        images = torch.cat(images)
    else:
        images = np.concatenate(images) if isinstance(images[0], np.ndarray) else list(chain.from_iterable(images))
    return LavitTextToImagePipelineOutput(
        images=images,
        codes=[codes for output in outputs for codes in output.codes],
        nsfw_content_detected=flagged if outputs[0].nsfw_content_detected is not None else None,
    )


def _as_asked(output: LavitTextToImagePipelineOutput, return_dict: bool) -> LavitTextToImagePipelineOutput | tuple:
    return output if return_dict else (output.images, output.codes, output.nsfw_content_detected)


def _covers_language_model(quantization: Any) -> bool:
    """Whether a `PipelineQuantizationConfig` has one backend for all parts, the language model among them."""
    return quantization.quant_mapping is None and "model" in (quantization.components_to_quantize or ["model"])


def _check_parts(
    model: Any, processor: Any, token_decoder: Any, visual_token_offset: int | None, eoi_token_id: int | None
) -> None:
    """Refuses parts whose codes mean different things: of other codebooks, or with other ids."""
    config, tokenizer = model.config, processor.tokenizer
    visual = config.visual_tokenizer_config
    values: dict[str, dict[str, int | None]] = {
        "number of visual codes": {
            "model": visual.codebook_size,
            "processor": tokenizer.codebook_size,
            "token decoder": token_decoder.config.codebook_size,
        },
        "width of a code": {"model": visual.codebook_dim, "token decoder": token_decoder.config.codebook_dim},
        "id of code 0": {
            "model": config.visual_token_offset,
            "processor": tokenizer.visual_token_offset,
            "pixel decoder": visual_token_offset,
        },
        "id of image end": {
            "model": config.eoi_token_id,
            "processor": tokenizer.eoi_token_id,
            "pixel decoder": eoi_token_id,
        },
    }
    for what, found in values.items():
        if len(set(found.values()) - {None}) > 1:
            listed = ", ".join(f"{value} in the {name}" for name, value in found.items() if value is not None)
            raise ValueError(f"These parts do not belong together: the {what} is {listed}.")
