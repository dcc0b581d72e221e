"""LaVIT's processor: images and text to what the model takes, in one of two forms.

- continuous: an image is as many placeholders as it has patches, plus `pixel_values`; the model encodes it and skips
  the placeholders of dropped patches. With a budget it is as many placeholders as it will have tokens;
- discrete: an image is the ids of its visual codes, which a visual tokenizer computes here; the model needs nothing
  else.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from ..modeling.checkpoint_files import find_file, hub_options
from ..modeling.configuration_lavit import LavitConfig
from ..modeling.generation_lavit import GENERATION_MODES
from ..modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer, move_pixels
from ..modeling.remote_code_mixin import IS_PACKAGE, RemoteCodeMixin, import_composition
from ..utils.json_files import read_json_object
from .chat_messages import check_chat, hidden_bracket, hide_brackets, show_brackets
from .image_budgets import BUDGETS, assign_budgets, assign_log_prior
from .image_processing_pil_lavit import Images, check_images, flatten, is_nested
from .tokenization_lavit import (
    PROCESSOR_FILE,
    TOKENIZER_FILE,
    IdRun,
    LavitTokenizer,
    as_rows,
    name_broken_file,
)

_UNSUPPORTED_TEXT_KWARGS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "stride",
    "return_length",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
)
_CHAT_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "tokenize",
    "return_tensors",
    "return_dict",
    "load_audio_from_video",
    "processor_kwargs",
)
_OWN_KWARGS = (
    "visual_mode",
    "generation_mode",
    *BUDGETS,
    "regions",
    "region_weight",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
)
VISUAL_MODES = ("continuous", "discrete")
Checkpoint = tuple[str | os.PathLike, dict[str, Any]]


class ImageTextProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, beside those of tokenizer and image processor."""

    _defaults = {}  # type: ignore[misc, var-annotated] # transformers 5.20 asks for it

    visual_mode: str | list | None
    generation_mode: str | None
    num_image_tokens: int | list | None
    keep_rate: float | None
    max_total_image_tokens: int | None
    regions: Any
    region_weight: float | None


class _ModalityKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of tokenizer and image processor alone: transformers 5.20 knows no others."""

    _defaults = {}  # type: ignore[misc, var-annotated]


class RemoteCodeProcessorMixin(RemoteCodeMixin, ProcessorMixin):
    """A processor that saves its code; transformers' tests compare a processor with the class right above it."""


class ImageTextProcessor(RemoteCodeProcessorMixin):
    """Joins image processor and tokenizer; `<image>` in a prompt is where an image goes, all else is text.

    Args:
        image_processor: A `LavitImageProcessor` or `LavitImageProcessorPil`.
        tokenizer: A `LavitTokenizer`.
        chat_template: A Jinja template; by default questions and answers as the original words them.
        image_seq_length: Patches per image: how many placeholders a continuous image gets.
        visual_mode: `"continuous"` (features, for understanding) or `"discrete"` (codes between image start and end);
            calls may override it.
        visual_tokenizer: What gives discrete images their codes, never saved: a `LavitVisualTokenizer` or a model that
            has one. Without it, that of the processor's own checkpoint is loaded on first need.
        pixel_decoder: What `post_process_multimodal_output` turns codes into images with, never saved: a
            `LavitPixelDecoderPipeline`, or anything to be called with `codes=[...]` that returns an object with
            `images`.
    """

    valid_processor_kwargs = ImageTextProcessorKwargs
    generation_mode = "text"  # of calls that do not say

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int = 256,
        visual_mode: str = "continuous",
        visual_tokenizer: Any = None,
        pixel_decoder: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # By its name: remote code has a class of its own.
        if LavitTokenizer.__name__ not in {base.__name__ for base in type(tokenizer).__mro__}:
            raise TypeError(f"{type(self).__name__} needs a LavitTokenizer, got {type(tokenizer).__name__}.")
        self.image_seq_length = operator.index(image_seq_length)  # NumPy's integers cannot be saved
        self.visual_mode = check_visual_mode(visual_mode)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self._checkpoint: Checkpoint | None = None
        if not chat_template and IS_PACKAGE:  # remote code has it beside the weights
            chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.visual_tokenizer = visual_tokenizer
        self.pixel_decoder = pixel_decoder
        if visual_tokenizer is not None:
            self.get_visual_tokenizer()  # says at once if it does not fit

    def __call__(  # type: ignore[override]
        self,
        images: Images | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares prompts with images for the model.

        Args:
            images: One image, a flat list in order of appearance, or one list per prompt: PIL images, arrays, tensors,
                paths or URLs.
            text: One prompt or several, with `<image>` where an image goes. Each stretch of text between images is
                tokenized as if it stood alone.
            kwargs: Those of tokenizer and image processor, and

                - `generation_mode`: What the model is to generate: `"text"` (default), `"image"` (ends each prompt
                  with the image start; a prompt may then be empty, to draw without one) or `"interleaved"`.
                - `visual_mode`: `"continuous"` or `"discrete"` for all images, or a (nested) list of one per image. By
                  default the processor's own; with `generation_mode="image"` images are by default their codes alone,
                  without start and end, which is what the original draws from.
                - `num_image_tokens`: How many tokens an image becomes: one number, or a (nested) list of one per
                  image. Its likeliest patches are kept. By default the visual tokenizer decides.
                - `keep_rate`: The share of its patches instead.
                - `max_total_image_tokens`: How many tokens the images of a prompt become together instead, in equal
                  shares.
                - `regions`: Where tokens are worth more, for every image (a list with one entry per image): a box
                  `(left, top, right, bottom)` in its pixels, a list of boxes, a mask [height, width], or `None`.
                - `region_weight`: How many times as likely a patch there is kept, compared with being dropped; 10 by
                  default.

        Returns:
            `input_ids` and `attention_mask`; if there are continuous images, `pixel_values` [images, 3, H, W]; with a
            budget for them, `num_image_tokens` [images]; with regions, `image_log_prior` [images, patches]. Without
            text, just the `pixel_values`.
        """
        if any(kwargs.pop(name, None) is not None for name in ("videos", "audio")):
            raise ValueError(f"{type(self).__name__} takes images and text, no videos and no audio.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        own, merged = self._merge_call_kwargs(kwargs)
        is_drawing = check_generation_mode(own["generation_mode"]) == "image"
        if text is None and is_drawing:
            raise ValueError('With `generation_mode="image"`, pass `text`, too (it may be empty).')
        if text is None:
            of_prompts = (*BUDGETS, "visual_mode", "regions", "region_weight")
            if given := [name for name in of_prompts if own[name] is not None]:
                raise ValueError(
                    f"Without text, images become pixel_values only, and {', '.join(given)} would be ignored. Pass "
                    '`text="<image>"`; or see `tokenize_images` for the ids of images.'
                )
            return self.image_processor(images, **merged["images_kwargs"])

        # 1. Find out which image stands where.
        prompts = check_prompts(text, allow_empty=is_drawing)
        segments = [prompt.split(self.image_token) for prompt in prompts]
        given_images = None if images is None or not flatten(images) else check_images(images)
        flat_images = assign_images(given_images, [len(parts) - 1 for parts in segments], self.image_token)
        has_bare_codes = is_drawing and not own["visual_mode"]
        default_mode = "discrete" if has_bare_codes else self.visual_mode
        modes = assign_modes(own["visual_mode"] or default_mode, len(flat_images))
        budgets = assign_budgets(
            {name: own[name] for name in BUDGETS}, [len(parts) - 1 for parts in segments], self.image_seq_length
        )
        log_prior = assign_log_prior(
            flat_images,
            own["regions"],
            own["region_weight"],
            self.image_processor.size,
            self.image_seq_length,
        )

        # 2. Turn every image into ids, and the continuous ones into pixels for the model.
        image_ids, image_inputs = self._encode_images(
            flat_images, modes, budgets, log_prior, has_bare_codes, merged["images_kwargs"]
        )

        # 3. Tokenize the text segments, and put the images between them.
        rows = self._build_rows(segments, image_ids)

        # 4. Cut, start the image to draw, and pad.
        text_inputs = self._finish_rows(rows, own, merged["text_kwargs"], is_drawing)
        return_tensors = merged["text_kwargs"].get("return_tensors")
        is_torch = str(getattr(return_tensors, "value", return_tensors)) == "pt"
        for name, values in image_inputs.items():
            text_inputs[name] = values if is_torch else values.cpu().numpy()
        return BatchFeature(
            text_inputs, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion
        )

    def tokenize_images(
        self,
        images: Images,
        num_image_tokens: int | Sequence[int] | None = None,
        keep_rate: float | None = None,
        regions: Any = None,
        region_weight: float | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """The ids of images as the language model reads and writes them: `[start]`, codes, `[end]`.

        Args:
            images: One image or a (nested) list.
            num_image_tokens: How many codes an image becomes, all or each; by default the visual tokenizer decides.
            keep_rate: The share of its patches instead.
            regions: Where codes are worth more, as in a call.
            region_weight: How much more, as in a call.
            kwargs: For the image processor.

        Returns:
            One integer tensor [codes + 2] per image, in order.
        """
        pixel_values = self.image_processor(images, **{**kwargs, "return_tensors": "pt"})["pixel_values"]
        size, num_patches = self.image_processor.size, self.image_seq_length
        log_prior = assign_log_prior(flatten(images), regions, region_weight, size, num_patches)
        budget = {"num_tokens": num_image_tokens, "keep_rate": keep_rate, "log_prior": log_prior}
        rows = self.tokenize_pixels(pixel_values, **budget)
        return [torch.tensor(self.tokenizer.add_image_start_and_end(ids)) for ids in rows]

    def tokenize_pixels(self, pixel_values: torch.Tensor, **options: Any) -> list[list[int]]:
        """The ids of the codes of images that are preprocessed already.

        Args:
            pixel_values: What `image_processor` returned, `[images, channels, height, width]`.
            options: Which patches are kept, as for [`~LavitVisualTokenizer.encode`]; `None` is the same as nothing.

        Returns:
            Of each image, without start and end.
        """
        visual_tokenizer = self.get_visual_tokenizer()
        options = {name: value for name, value in options.items() if value is not None}
        with torch.no_grad():
            output = visual_tokenizer.encode(move_pixels(pixel_values, visual_tokenizer), **options)
        ids = self.tokenizer.convert_codes_to_ids(output.codes)
        return [part.tolist() for part in ids.split(output.num_tokens.tolist())]

    def get_visual_tokenizer(self) -> Any:
        """What gives images their codes.

        Returns:
            `visual_tokenizer` (of a whole model its part); without one that of the processor's own checkpoint, loaded
            in fp32 on first need and kept.

        Raises:
            TypeError: If `visual_tokenizer` is something else, such as a path.
            ValueError: If its sizes do not fit this processor, or there is none.
        """
        found = load_visual_tokenizer(self._checkpoint) if self.visual_tokenizer is None else self.visual_tokenizer
        self.visual_tokenizer = find_visual_tokenizer(found, self.tokenizer.codebook_size, self.image_seq_length)
        return self.visual_tokenizer

    def get_num_image_tokens(self, input_ids: Any) -> list[list[int]]:
        """Ids between start and end of every image, per row: the patches of a continuous one, the codes of a discrete
        one. Codes without a start or without an end do not count.
        """
        counts: list[list[int]] = []
        for row in input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids:
            of_row, start = [], None
            for position, index in enumerate(row):
                if index == self.tokenizer.boi_token_id:
                    start = position
                elif index == self.tokenizer.eoi_token_id and start is not None:
                    of_row.append(position - start - 1)
                    start = None
            counts.append(of_row)
        return counts

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As everywhere. With `tokenize=True` all text of the conversation stays text, `<image>` included (with
        `sanitize_control_tokens=True` that of template variables, too); a prompt that is rendered first and passed to
        the processor afterwards cannot make that difference. `generation_mode` reaches the template, too.
        """
        check_chat(conversation)
        self._share_generation_mode(chat_template, kwargs)
        is_strict = kwargs.pop("sanitize_control_tokens", False)  # done here, not in transformers: more strictly
        if is_strict and not kwargs.get("tokenize"):
            raise ValueError("`sanitize_control_tokens=True` requires `tokenize=True`.")
        hidden = None
        if kwargs.get("tokenize"):
            names = ["tools", "documents"]
            if is_strict:
                names = [name for name in kwargs if name not in _CHAT_ARGUMENTS]
            hidden, (conversation, *values) = hide_brackets(
                conversation,
                *(kwargs.get(name) for name in names),
                beside=[chat_template, self.chat_template, kwargs],
            )
            kwargs.update(zip(names, values, strict=True))
        token = hidden_bracket.set(hidden)
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        finally:
            hidden_bracket.reset(token)

    def _share_generation_mode(self, chat_template: str | None, kwargs: dict[str, Any]) -> None:
        """Hands `generation_mode` to the template if that asks for it, and to the call of the processor."""
        processor_kwargs = kwargs.get("processor_kwargs") or {}
        mode = kwargs.pop("generation_mode", None) or processor_kwargs.get("generation_mode")
        if mode is None:
            return
        check_generation_mode(mode)
        if kwargs.get("tokenize"):
            kwargs["processor_kwargs"] = {**processor_kwargs, "generation_mode": mode}
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        template = named.get(chat_template or "default", chat_template or self.chat_template)
        if template is not None and "generation_mode" in template:
            kwargs["generation_mode"] = mode

    def post_process_multimodal_output(  # type: ignore[override]
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        pixel_decoder: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Turns generated ids into text, images, or both.

        Args:
            generated_outputs: What `generate` returned, prompts included: [batch, sequence] or [sequence]. New ids
                alone are understood, too, as long as they hold nothing but codes and image end.
            skip_special_tokens: Whether to leave control tokens out of text.
            generation_mode: As for `generate`. Of `"image"`, the last image of each sequence counts (the one that the
                prompt started); `"interleaved"` returns those of the prompt as well.
            pixel_decoder: Turns codes into images; by default the processor's own, if it has one.
            kwargs: For the tokenizer's `decode`.

        Returns:
            - `"text"`: texts.
            - `"image"`: images, or without a pixel decoder codes, a tensor [codes] per sequence.
            - `"interleaved"`: per sequence a list of texts and images (or codes), in order. Texts that are empty are
              left out, and so are images that entered as continuous features: they have no codes.
        """
        mode = check_generation_mode(generation_mode)
        if mode == "text":
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        pixel_decoder = self.pixel_decoder if pixel_decoder is None else pixel_decoder
        rows = [self.tokenizer.split_images(row) for row in as_rows(generated_outputs)]
        if mode == "image":
            return draw_images([last_image(runs) for runs in rows], pixel_decoder)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

        return join_runs(rows, decode, pixel_decoder)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What the placeholder of a continuous image stands for, in token names."""
        budgets = image_inputs.get("num_image_tokens")
        count = self.image_seq_length if budgets is None else int(budgets[image_idx])
        return self.tokenizer.boi_token + self.image_token * count + self.tokenizer.eoi_token

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders per continuous image, whatever its size (vLLM asks for this); `kwargs` are those of a call."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        budgets = assign_budgets({name: kwargs.get(name) for name in BUDGETS}, [count], self.image_seq_length)
        return MultiModalData(
            num_image_tokens=budgets or [self.image_seq_length] * count, num_image_patches=[1] * count
        )

    # Steps of a call

    def _merge_call_kwargs(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The processor's own arguments, and the others by modality."""
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})
        own: dict[str, Any] = {}
        for name in _OWN_KWARGS:  # some versions of transformers put them among those of the tokenizer
            values = (kwargs.pop(name, None), text_kwargs.pop(name, None))
            own[name] = next((value for value in values if value is not None), None)
            if own[name] is None and name != "visual_mode":
                own[name] = getattr(self, name, None)
        if text_kwargs:
            kwargs["text_kwargs"] = text_kwargs
        return own, self._merge_kwargs(
            _ModalityKwargs,  # type: ignore[arg-type]  # annotated as an instance, it takes the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )

    def _encode_images(
        self,
        images: list[Any],
        modes: Sequence[str],
        budgets: list[int] | None,
        log_prior: torch.Tensor | None,
        has_bare_codes: bool,
        images_kwargs: dict[str, Any],
    ) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """The ids of every image, and what the model is given of the continuous ones."""
        if not images:
            return [], {}
        pixel_values = self.image_processor(images, **{**images_kwargs, "return_tensors": "pt"})["pixel_values"]
        continuous = [index for index, mode in enumerate(modes) if mode == "continuous"]
        discrete = [index for index, mode in enumerate(modes) if mode == "discrete"]
        counts = torch.tensor(budgets or [self.image_seq_length] * len(images))
        ids = [self.tokenizer.add_image_start_and_end([self.image_token_id] * count) for count in counts.tolist()]
        if discrete:
            chosen = {"num_tokens": counts[discrete] if budgets else None}
            chosen["log_prior"] = None if log_prior is None else log_prior[discrete]
            of_codes = self.tokenize_pixels(pixel_values[discrete], **chosen)
            for index, codes in zip(discrete, of_codes, strict=True):
                ids[index] = codes if has_bare_codes else self.tokenizer.add_image_start_and_end(codes)
        if not continuous:
            return ids, {}
        inputs = {"pixel_values": pixel_values[continuous]}
        if budgets:
            inputs["num_image_tokens"] = counts[continuous]
        if log_prior is not None:
            inputs["image_log_prior"] = log_prior[continuous]
        return ids, inputs

    def _build_rows(self, segments: list[list[str]], image_ids: list[list[int]]) -> list[TokenRow]:
        texts = [show_brackets(part, hidden_bracket.get()) for parts in segments for part in parts]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        text_tokens = iter(zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True))
        images = iter(image_ids)
        rows = []
        for parts in segments:
            row = TokenRow()
            for position in range(len(parts)):
                if position > 0:
                    ids = next(images)
                    row.add_image(ids, self.image_token, self.tokenizer.decode(ids))
                row.add_text(*next(text_tokens))
            rows.append(row)
        return rows

    def _finish_rows(
        self, rows: list[TokenRow], own: dict[str, Any], options: dict[str, Any], is_drawing: bool
    ) -> dict[str, Any]:
        """Truncates and pads token rows as a tokenizer would; when drawing, ends them with the image start."""
        for name in _UNSUPPORTED_TEXT_KWARGS:
            if options.get(name):
                raise ValueError(f"{type(self).__name__} does not support `{name}`.")
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            max_length = options.get("max_length") or self.tokenizer.model_max_length
            for index, row in enumerate(rows):
                row.truncate(max(max_length - is_drawing, 0), self.tokenizer.truncation_side, index)
        if is_drawing:
            for row in rows:
                row.add_start(self.tokenizer.boi_token_id)
        side = options.get("padding_side") or self.tokenizer.padding_side
        padded = self.tokenizer.pad(
            {"input_ids": [row.ids for row in rows]},
            padding=options.get("padding") or False,
            max_length=options.get("max_length"),
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=side,
            return_attention_mask=options.get("return_attention_mask"),
            verbose=False,
        )
        inputs = dict(padded)
        if own["return_mm_token_type_ids"]:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        if own["return_text_replacement_offsets"]:
            inputs["text_replacement_offsets"] = [row.replacements for row in rows]
        if options.get("return_offsets_mapping"):
            inputs["offset_mapping"] = [
                _pad_offsets(row.offsets, len(ids), side) for row, ids in zip(rows, inputs["input_ids"], strict=True)
            ]
        return inputs

    # Loading and saving

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Loads a processor.

        Args:
            pretrained_model_name_or_path: A directory or a repository of the Hub.
            kwargs: `visual_tokenizer`, `pixel_decoder`, `visual_mode` and `image_seq_length` as for the class, and
                those of `ProcessorMixin.from_pretrained`.

        Raises:
            OSError: If a file is missing or corrupt.
            ValueError: If a file cannot be used, or does not fit the `config.json` of the model beside it.
        """
        if IS_PACKAGE:
            kwargs.pop("trust_remote_code", None)  # no remote code where the package is: the tokenizer's would run
        # Everything left in `kwargs` reaches the tokenizer, which would keep it and save it with its own settings.
        names = ("image_seq_length", "visual_mode", "visual_tokenizer", "pixel_decoder")
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
        # What locates the checkpoint: the visual tokenizer is loaded from the same place.
        hub_kwargs = hub_options(kwargs)
        check_visual_mode(own.get("visual_mode", "continuous"))
        with name_broken_file(pretrained_model_name_or_path):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.image_seq_length = fit_to_model(processor, pretrained_model_name_or_path, hub_kwargs)
        processor._checkpoint = (pretrained_model_name_or_path, hub_kwargs)
        for name, value in own.items():
            setattr(processor, name, value)
        if processor.visual_tokenizer is not None:
            processor.get_visual_tokenizer()  # says at once if it does not fit
        return processor

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | os.PathLike | None = None,
        text_model_name_or_path: str | os.PathLike | None = None,
        *,
        config: Any = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        codebook_size: int | None = None,
        **kwargs: Any,
    ) -> ImageTextProcessor:
        """The processor of a model that [`LavitForConditionalGeneration.from_vision_text_pretrained`] has built.

        Args:
            vision_model_name_or_path: Where the vision encoder's image processor is: its directory or Hub id, or that
                of a visual tokenizer.
            text_model_name_or_path: Where the language model's tokenizer is.
            config: The new model, or its configuration. Without it one is made of the two models' own.
            image_processor: An image processor to use instead.
            tokenizer: A text tokenizer to use instead.
            codebook_size: Number of visual codes, where `config` does not tell.
            kwargs: Those of the class, such as `visual_tokenizer` and `visual_mode`.

        Raises:
            ImportError: If this is remote code: the package composes processors.
            TypeError: If `config` is neither a model nor its configuration.
            ValueError: If something is missing, or the tokenizer does not fit the language model.
        """
        return import_composition().compose_processor(
            cls,
            vision_model_name_or_path,
            text_model_name_or_path,
            config,
            image_processor,
            tokenizer,
            codebook_size,
            **kwargs,
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        # `ProcessorMixin` takes any argument whose name contains "tokenizer" for a text tokenizer.
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        # Ids first: there `Trainer` looks for the lengths of rows.
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def to_dict(self) -> dict[str, Any]:
        """As everywhere, without the models that the processor uses."""
        parts = copy.copy(self)  # the base class copies all there is, weights too, before it picks what to save
        parts.visual_tokenizer = parts.pixel_decoder = None
        values = super(ImageTextProcessor, parts).to_dict()
        return {name: value for name, value in values.items() if name not in ("visual_tokenizer", "pixel_decoder")}


def _pad_offsets(offsets: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    padding = [(0, 0)] * (length - len(offsets))
    return padding + offsets if side == "left" else offsets + padding


@dataclass
class TokenRow:
    """The tokens of one prompt.

    `offsets` are the characters a token stands for, in the prompt with every placeholder replaced by the names of its
    image's tokens (empty ranges for those themselves); `replacements` tell where that happened, as `ProcessorMixin`
    does.
    """

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    replacements: list[dict[str, Any]] = field(default_factory=list)
    _prompt_length: int = 0
    _expanded_length: int = 0

    def add_text(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        """Appends a text segment."""
        start = self._expanded_length
        self.ids.extend(ids)
        self.offsets.extend((start + first, start + last) for first, last in offsets)
        self._prompt_length += len(text)
        self._expanded_length += len(text)

    def add_image(self, ids: Sequence[int], placeholder: str, replacement: str) -> None:
        """Appends the tokens of an image, whose names are `replacement`."""
        start, new_start = self._prompt_length, self._expanded_length
        self.image_spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids.extend(ids)
        self.offsets.extend([(new_start, new_start)] * len(ids))
        self._prompt_length += len(placeholder)
        self._expanded_length += len(replacement)
        self.replacements.append(
            {
                "type": "image",
                "span": (start, self._prompt_length),
                "new_span": (new_start, self._expanded_length),
                "text": placeholder,
                "replacement": replacement,
            }
        )

    def add_start(self, index: int) -> None:
        """Appends the start of an image that is to be drawn; it stands for no characters."""
        self.ids.append(index)
        self.offsets.append((self._expanded_length, self._expanded_length))

    def truncate(self, max_length: int, side: str, prompt_index: int) -> None:
        """Cuts text off one side; refuses to cut images, whose features the model would look for in vain."""
        excess = len(self.ids) - max_length
        if excess <= 0:
            return
        first, last = (excess, len(self.ids)) if side == "left" else (0, max_length)
        if any(start < first or end > last for start, end in self.image_spans):
            raise ValueError(
                f"Truncating prompt {prompt_index} from {len(self.ids)} to `max_length={max_length}` tokens on the "
                f"{side} would cut an image. Raise `max_length`, or pass fewer images or shorter text."
            )
        self.ids, self.offsets = self.ids[first:last], self.offsets[first:last]
        self.image_spans = [(start - first, end - first) for start, end in self.image_spans]


def check_prompts(text: Any, allow_empty: bool = False) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`text` must be a string or a list of strings.")
    if not prompts:
        raise ValueError("`text` is an empty list; pass at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not prompt and not allow_empty:
            raise ValueError(f"Prompt {index} is empty: it holds neither text nor an image placeholder.")
    return list(prompts)


def assign_images(images: Any, counts: Sequence[int], image_token: str) -> list[Any]:
    """All images in order of appearance, after checking that every prompt has as many images as placeholders.

    Args:
        images: Opened images: one, a flat list, a list per prompt, or `None`.
        counts: Placeholders per prompt.
        image_token: The placeholder, for messages.
    """
    if images is None:
        groups: list[list[Any]] = [[]]
    elif is_nested(images):
        groups = [flatten(group) for group in images]
    else:
        groups = [flatten(images)]
    details = _find_mismatch(groups, counts, per_prompt=images is not None and is_nested(images))
    if details:
        raise ValueError(
            f"The number of {image_token} tokens in the prompts should be the same as the number of images passed: "
            f"{details}."
        )
    return flatten(groups)


def _find_mismatch(groups: list[list[Any]], counts: Sequence[int], per_prompt: bool) -> str:
    if per_prompt and len(groups) != len(counts):
        return f"got {len(groups)} lists of images for {len(counts)} prompts"
    if per_prompt:
        wrong = (i for i, (group, count) in enumerate(zip(groups, counts, strict=True)) if len(group) != count)
        if (index := next(wrong, None)) is not None:
            return f"prompt {index} has {counts[index]}, but got {len(groups[index])} image(s) for it"
        return ""
    num_images = sum(map(len, groups))
    if num_images == sum(counts):
        return ""
    where = ", ".join(f"{count} in prompt {index}" for index, count in enumerate(counts))
    return f"found {sum(counts)} ({where}), but got {num_images} image(s)"


def assign_modes(visual_mode: Any, num_images: int) -> list[str]:
    """The visual mode of every image, from one for all or (nested) lists of one per image."""
    if isinstance(visual_mode, str):
        modes = [visual_mode] * num_images
    else:
        modes = flatten(visual_mode)
        if len(modes) != num_images:
            raise ValueError(f"Got {len(modes)} visual modes for {num_images} image(s).")
    return [check_visual_mode(mode) for mode in modes]


def check_visual_mode(mode: Any) -> str:
    """Returns the mode of an image if it is one."""
    if mode not in VISUAL_MODES:
        raise ValueError(f"`visual_mode` must be 'continuous' or 'discrete', got {mode!r}.")
    return mode


def check_generation_mode(mode: str | None) -> str:
    """Returns what is to be generated; text by default."""
    mode = "text" if mode is None else mode
    if mode not in GENERATION_MODES:
        raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved', got {mode!r}.")
    return mode


def find_visual_tokenizer(visual_tokenizer: Any, codebook_size: int, image_seq_length: int) -> Any:
    """Returns the visual tokenizer (of a whole model: its part) after checking that it fits the processor.

    Raises:
        TypeError: If it is something else, such as a path.
        ValueError: If its sizes do not fit.
    """
    part = getattr(visual_tokenizer, "visual_tokenizer", visual_tokenizer)
    if not isinstance(part, torch.nn.Module) or not callable(getattr(part, "encode", None)):
        raise TypeError(
            "`visual_tokenizer` must be a LavitVisualTokenizer or a model that has one, got "
            f"{type(visual_tokenizer).__name__}. From a path, load it with `LavitVisualTokenizer.from_pretrained`."
        )
    config = getattr(part, "config", None)
    for name, expected, what in (
        ("codebook_size", codebook_size, "tokenizer's visual vocabulary"),
        ("num_patches", image_seq_length, "processor's `image_seq_length`"),
    ):
        if config is not None and getattr(config, name, expected) != expected:
            raise ValueError(
                f"The visual tokenizer does not fit this processor: its {name} is {getattr(config, name)}, "
                f"the {what} is {expected}."
            )
    return part


def load_visual_tokenizer(checkpoint: Checkpoint | None) -> LavitVisualTokenizer:
    """The visual tokenizer of a processor's own checkpoint, in fp32: codes are exact.

    Args:
        checkpoint: Directory or Hub id, and what locates it; `None` if the processor was not loaded from one.
    """
    if checkpoint is None:
        raise ValueError(
            "Discrete images need a visual tokenizer: pass `visual_tokenizer=`, or load the processor with "
            "`from_pretrained` from a checkpoint that has one."
        )
    path, hub_kwargs = checkpoint
    try:
        return LavitVisualTokenizer.from_pretrained(path, dtype=torch.float32, **hub_kwargs).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Discrete images need a visual tokenizer, and none could be loaded from the processor's own directory, "
            f"{path}: pass `visual_tokenizer=` to the processor. ({error})"
        ) from error


def last_image(runs: list[IdRun]) -> torch.Tensor:
    """The codes of the last image; none if there is no image."""
    return next((_codes(run) for run in reversed(runs) if run.kind != "text"), torch.empty(0, dtype=torch.long))


def draw_images(codes: list[torch.Tensor], pixel_decoder: Callable[..., Any] | None) -> list[Any]:
    """The images of a list of codes, all decoded in one call; without a pixel decoder, the codes."""
    if pixel_decoder is None or not codes:
        return list(codes)
    images = pixel_decoder(codes=codes).images
    if len(images) != len(codes):
        raise ValueError(f"The pixel decoder returned {len(images)} image(s) for {len(codes)} lists of codes.")
    return list(images)


def join_runs(
    rows: list[list[IdRun]], decode: Callable[[list[int]], str], pixel_decoder: Callable[..., Any] | None
) -> list[list[Any]]:
    """Per row its texts and images in order, without empty texts and without images that have no codes to show."""
    codes = [_codes(run) for runs in rows for run in runs if run.kind == "image"]
    images = iter(draw_images(codes, pixel_decoder))
    joined: list[list[Any]] = []
    for runs in rows:
        parts = [next(images) if run.kind == "image" else decode(run.ids) for run in runs if run.kind != "features"]
        joined.append([part for part in parts if not isinstance(part, str) or part])
    return joined


def _codes(run: IdRun) -> torch.Tensor:
    return torch.tensor(run.ids, dtype=torch.long)


def fit_to_model(processor: Any, checkpoint: str | os.PathLike, hub_kwargs: dict[str, Any]) -> int:
    """Compares a processor with the `config.json` beside it, if that is a LaVIT's.

    Args:
        processor: As its own files made it.
        checkpoint: Directory or Hub id of both.
        hub_kwargs: What locates it.

    Returns:
        Patches per image: what its own file says, or else what the model's configuration says.

    Raises:
        OSError: If neither file tells.
        ValueError: If the two do not fit.
    """
    files = {name: find_file(checkpoint, name, hub_kwargs) for name in ("config.json", PROCESSOR_FILE)}
    values = {name: read_json_object(file) if file else {} for name, file in files.items()}
    own = values[PROCESSOR_FILE].get("image_seq_length")
    if values["config.json"].get("model_type") != LavitConfig.model_type:
        if own is None:
            raise OSError(
                f"{checkpoint} does not say how many patches an image has: {PROCESSOR_FILE} is missing, or has no "
                "`image_seq_length`, and there is no config.json of a LaVIT. Save the processor there again."
            )
        return own
    config = LavitConfig.from_pretrained(checkpoint, **hub_kwargs)
    tokenizer, visual = processor.tokenizer, config.visual_tokenizer_config
    rows = config.text_config.vocab_size
    for index, token in tokenizer.added_tokens_decoder.items():
        if index >= rows and index != config.image_token_id:
            raise ValueError(
                f"{os.path.join(checkpoint, TOKENIZER_FILE)} does not fit {files['config.json']}: the token "
                f"{token.content!r:.50} has the id {index}, but the model {rows} rows of embeddings. If you added "
                "tokens, call `model.resize_token_embeddings(len(processor.tokenizer))` before you save the model."
            )
    own = visual.num_patches if own is None else own
    target = processor.image_processor.size
    size = (target.height, target.width)
    if not processor.image_processor.do_resize or None in size:  # then the pictures decide
        size = visual.image_size
    for name, file, found, expected in (
        ("size", PROCESSOR_FILE, size, visual.image_size),
        ("image_seq_length", PROCESSOR_FILE, own, visual.num_patches),
        ("codebook_size", "tokenizer.json", tokenizer.codebook_size, visual.codebook_size),
        ("visual_token_offset", "tokenizer.json", tokenizer.visual_token_offset, config.visual_token_offset),
        ("image_token_id", "tokenizer.json", tokenizer.image_token_id, config.image_token_id),
    ):
        if found != expected:
            raise ValueError(
                f"{os.path.join(checkpoint, file)} does not fit {files['config.json']}: {name} is {found} by the "
                f"former and {expected} by the latter."
            )
    return own


__all__ = ["ImageTextProcessor"]
