"""LaVIT's processor: images and text to what the model takes, in one of three forms.

An image's number of tokens is known only after the visual tokenizer has looked at it:

- light (no visual tokenizer attached): an image is as many placeholders as it has patches, plus `pixel_values`; the
  model selects. For data loading and serving.
- attached: an image is one placeholder per kept patch, plus their `image_features`; the encoder has run once, here.
- discrete: an image is the ids of its visual codes; the model needs nothing else.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .chat_template import DEFAULT_CHAT_TEMPLATE, hide_brackets, show_brackets
from .image_structure import fetch_images, flatten
from .prompt_layout import TokenRow, assign_images, assign_modes, check_prompts
from .tokenization_lavit import LavitTokenizer

# What locates a checkpoint; the visual tokenizer is loaded from the same place as the processor.
_HUB_KWARGS = ("cache_dir", "local_files_only", "token", "revision", "subfolder", "proxies")
_UNSUPPORTED_TEXT_KWARGS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "stride",
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


class ImageTextProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, beside those of tokenizer and image processor.

    hidden_bracket: Set by `apply_chat_template`: the character that stands for a "<" typed in the chat.
    """

    hidden_bracket: str | None


class ImageTextProcessor(ProcessorMixin):
    """Joins image processor and tokenizer; `<image>` in a prompt is where an image goes, all else is text.

    Args:
        image_processor: A `LavitImageProcessor` or `LavitImageProcessorPil`.
        tokenizer: A `LavitTokenizer`.
        chat_template: A Jinja template; by default questions and answers as the release words them.
        image_seq_length: Patches per image: how many placeholders an image gets in the light form.
        visual_mode: `"continuous"` (features, for understanding) or `"discrete"` (codes); calls may override it.
        visual_tokenizer: A `LavitVisualTokenizer`, held by reference and never saved; makes the attached form.
            Discrete images work without one: it is then loaded from the processor's own checkpoint on first need.
    """

    valid_processor_kwargs = ImageTextProcessorKwargs
    hidden_bracket: str | None = None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int = 256,
        visual_mode: str = "continuous",
        visual_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(tokenizer, LavitTokenizer):
            raise TypeError(f"{type(self).__name__} needs a LavitTokenizer, got {type(tokenizer).__name__}.")
        assign_modes(visual_mode, 1)
        self.image_seq_length = image_seq_length
        self.visual_mode = visual_mode
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self._checkpoint: tuple[str | os.PathLike, dict[str, Any]] | None = None
        self._loaded_visual_tokenizer: Any = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE, **kwargs)
        self.visual_tokenizer = self._check_fits(visual_tokenizer)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares prompts with images for the model.

        Args:
            images: One image, a flat list in order of appearance, or one list per prompt: PIL images, arrays, tensors,
                paths or URLs.
            text: One prompt or several, with `<image>` where an image goes. Each stretch of text between images is
                tokenized as if it stood alone.
            kwargs: Those of tokenizer and image processor, and `visual_mode`: `"continuous"` or `"discrete"` for all
                images, or a (nested) list of one per image; by default the processor's own.

        Returns:
            `input_ids` and `attention_mask`, and, if there are continuous images, `pixel_values` [images, 3, H, W]
            (light) or `image_features` [total kept, hidden] (attached). Without text, just the `pixel_values`.
        """
        if any(kwargs.pop(name, None) is not None for name in ("videos", "audio")):
            raise ValueError(f"{type(self).__name__} takes images and text, no videos and no audio.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        visual_mode = kwargs.pop("visual_mode", None) or self.visual_mode
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if text is None:
            return self.image_processor(images, **merged["images_kwargs"])

        # 1. Find out which image stands where.
        prompts = check_prompts(text)
        segments = [prompt.split(self.image_token) for prompt in prompts]
        images = None if images is None or not flatten(images) else fetch_images(images)
        flat_images = assign_images(images, [len(parts) - 1 for parts in segments], self.image_token)
        modes = assign_modes(visual_mode, len(flat_images))

        # 2. Turn every image into ids, and the continuous ones into what the model replaces their placeholders by.
        image_ids, image_inputs = self._encode_images(flat_images, modes, merged["images_kwargs"])

        # 3. Tokenize the text segments, and put the images between them.
        rows = self._build_rows(segments, image_ids, merged["hidden_bracket"])

        # 4. Cut and pad.
        text_inputs = self._finish_rows(rows, merged)
        return_tensors = merged["text_kwargs"].get("return_tensors")
        data = {**text_inputs, **_convert_image_inputs(image_inputs, return_tensors)}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def tokenize_images(self, images: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The ids of images as the language model reads and writes them: `[start]`, codes, `[end]`.

        Args:
            images: One image or a (nested) list.
            kwargs: For the image processor.

        Returns:
            One integer tensor [codes + 2] per image, in order.
        """
        pixel_values = self.image_processor(images, **{**kwargs, "return_tensors": "pt"})["pixel_values"]
        return [torch.tensor(ids) for ids in self._discrete_ids(pixel_values)]

    def get_num_image_tokens(self, input_ids: Any) -> list[list[int]]:
        """Tokens between start and end of every image, per row: the number of patches kept, in the attached and the
        discrete form.
        """
        counts: list[list[int]] = []
        for row in input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids:
            starts = [i for i, index in enumerate(row) if index == self.tokenizer.boi_token_id]
            ends = [i for i, index in enumerate(row) if index == self.tokenizer.eoi_token_id]
            counts.append([end - start - 1 for start, end in zip(starts, ends, strict=False)])
        return counts

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As everywhere. With `tokenize=True` all text of the conversation stays text, `<image>` included (with
        `sanitize_control_tokens=True` that of template variables, too); a prompt that is rendered first and passed to
        the processor afterwards cannot make that difference.
        """
        if kwargs.get("tokenize"):
            names = ["tools", "documents"]
            if kwargs.pop("sanitize_control_tokens", False):  # done here, more strictly; includes template variables
                names = [name for name in kwargs if name not in _CHAT_ARGUMENTS]
            hidden, (conversation, *values) = hide_brackets(conversation, *(kwargs.get(name) for name in names))
            kwargs.update(zip(names, values, strict=True))
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "hidden_bracket": hidden}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What an image's placeholder stands for in the light form, in token names."""
        return self.tokenizer.boi_token + self.image_token * self.image_seq_length + self.tokenizer.eoi_token

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders per image in the light form, whatever its size (vLLM asks for this)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    # Steps of a call

    def _encode_images(
        self, images: list[Any], modes: Sequence[str], images_kwargs: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """The ids of every image, and the model inputs of the continuous ones."""
        if not images:
            return [], {}
        pixel_values = self.image_processor(images, **{**images_kwargs, "return_tensors": "pt"})["pixel_values"]
        where = {mode: [i for i, other in enumerate(modes) if other == mode] for mode in ("continuous", "discrete")}
        ids: list[list[int]] = [[] for _ in images]
        inputs: dict[str, torch.Tensor] = {}
        if where["discrete"]:
            found = self._discrete_ids(pixel_values[where["discrete"]])
            for index, codes in zip(where["discrete"], found, strict=True):
                ids[index] = codes
        if where["continuous"]:
            counts, inputs = self._continuous_inputs(pixel_values[where["continuous"]])
            for index, count in zip(where["continuous"], counts, strict=True):
                ids[index] = self._between_start_and_end([self.image_token_id] * count)
        return ids, inputs

    def _continuous_inputs(self, pixel_values: torch.Tensor) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Placeholders per image, and what the model needs to fill them."""
        if self.visual_tokenizer is None:
            return [self.image_seq_length] * len(pixel_values), {"pixel_values": pixel_values}
        with torch.no_grad():
            output = self.visual_tokenizer.embed(_move_to(pixel_values, self.visual_tokenizer))
        return output.num_tokens.tolist(), {"image_features": output.features}

    def _discrete_ids(self, pixel_values: torch.Tensor) -> list[list[int]]:
        visual_tokenizer = self._visual_tokenizer_for_codes()
        with torch.no_grad():
            output = visual_tokenizer.encode(_move_to(pixel_values, visual_tokenizer))
        ids = self.tokenizer.convert_codes_to_ids(output.codes)
        return [self._between_start_and_end(part.tolist()) for part in ids.split(output.num_tokens.tolist())]

    def _between_start_and_end(self, ids: list[int]) -> list[int]:
        return [self.tokenizer.boi_token_id, *ids, self.tokenizer.eoi_token_id]

    def _build_rows(
        self, segments: list[list[str]], image_ids: list[list[int]], hidden_bracket: str | None
    ) -> list[TokenRow]:
        texts = [show_brackets(part, hidden_bracket) for parts in segments for part in parts]
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

    def _finish_rows(self, rows: list[TokenRow], merged: dict[str, Any]) -> dict[str, Any]:
        """Truncates and pads token rows as a tokenizer would."""
        options = merged["text_kwargs"]
        for name in _UNSUPPORTED_TEXT_KWARGS:
            if options.get(name):
                raise ValueError(f"{type(self).__name__} does not support `{name}`.")
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            max_length = options.get("max_length") or self.tokenizer.model_max_length
            for index, row in enumerate(rows):
                row.truncate(max_length, self.tokenizer.truncation_side, index)
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
        if merged["return_mm_token_type_ids"]:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        if merged["return_text_replacement_offsets"]:
            inputs["text_replacement_offsets"] = [row.replacements for row in rows]
        if options.get("return_offsets_mapping"):
            inputs["offset_mapping"] = [
                _pad_offsets(row.offsets, len(ids), side) for row, ids in zip(rows, inputs["input_ids"], strict=True)
            ]
        return inputs

    # The visual tokenizer: held by reference, never part of what is saved

    def _check_fits(self, visual_tokenizer: Any) -> Any:
        config = getattr(visual_tokenizer, "config", None)
        for name, expected, what in (
            ("codebook_size", self.tokenizer.codebook_size, "tokenizer's visual vocabulary"),
            ("num_patches", self.image_seq_length, "processor's `image_seq_length`"),
        ):
            if config is not None and getattr(config, name, expected) != expected:
                raise ValueError(
                    f"The visual tokenizer does not fit this processor: its {name} is {getattr(config, name)}, "
                    f"the {what} is {expected}."
                )
        return visual_tokenizer

    def _visual_tokenizer_for_codes(self) -> Any:
        """The attached visual tokenizer, or one loaded from the processor's checkpoint (in fp32: codes are exact)."""
        if self.visual_tokenizer is not None:
            return self.visual_tokenizer
        if self._loaded_visual_tokenizer is None:
            if self._checkpoint is None:
                raise ValueError(
                    "Discrete images need a visual tokenizer: pass `visual_tokenizer=`, or load the processor with "
                    "`from_pretrained` from a checkpoint that has one."
                )
            from ..modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer

            path, hub_kwargs = self._checkpoint
            loaded = LavitVisualTokenizer.from_pretrained(path, dtype=torch.float32, **hub_kwargs)
            self._loaded_visual_tokenizer = self._check_fits(loaded.eval())
        return self._loaded_visual_tokenizer

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "ImageTextProcessor":
        """Loads a processor.

        Args:
            pretrained_model_name_or_path: A directory or a repository of the Hub.
            kwargs: `visual_tokenizer`, `visual_mode` and `image_seq_length` as for the class, and those of
                `ProcessorMixin.from_pretrained`.
        """
        # Everything left in `kwargs` reaches the tokenizer, which would keep it and save it with its own settings.
        visual_tokenizer = kwargs.pop("visual_tokenizer", None)
        own = {name: kwargs.pop(name) for name in ("visual_mode", "image_seq_length") if name in kwargs}
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        assign_modes(own.get("visual_mode", processor.visual_mode), 1)
        for name, value in own.items():
            setattr(processor, name, value)
        processor._checkpoint = (pretrained_model_name_or_path, hub_kwargs)
        processor.visual_tokenizer = processor._check_fits(visual_tokenizer)
        return processor

    @classmethod
    def get_attributes(cls) -> list[str]:
        # `ProcessorMixin` takes any argument whose name contains "tokenizer" for a text tokenizer.
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        images = "pixel_values" if self.visual_tokenizer is None else "image_features"
        return ["input_ids", "attention_mask", images]

    def to_dict(self) -> dict[str, Any]:
        light = copy.copy(self)  # the base class deep-copies all there is before it picks what to save
        del light.visual_tokenizer, light._loaded_visual_tokenizer
        return super(ImageTextProcessor, light).to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageTextProcessor":
        for shared in (self.visual_tokenizer, self._loaded_visual_tokenizer):
            if shared is not None:
                memo[id(shared)] = shared
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded_visual_tokenizer": None}  # loaded again on need


def _move_to(pixel_values: torch.Tensor, visual_tokenizer: Any) -> torch.Tensor:
    # An offloaded model is on the meta device between calls, and moves its inputs by itself.
    device = None if visual_tokenizer.device.type == "meta" else visual_tokenizer.device
    return pixel_values.to(device=device, dtype=visual_tokenizer.dtype)


def _convert_image_inputs(inputs: dict[str, torch.Tensor], return_tensors: Any) -> dict[str, Any]:
    """Tensors as they are for PyTorch, arrays otherwise, as other processors return them."""
    if str(getattr(return_tensors, "value", return_tensors)) == "pt":
        return dict(inputs)
    # NumPy has no bfloat16
    return {name: value.float().cpu().numpy() for name, value in inputs.items()}


def _pad_offsets(offsets: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    padding = [(0, 0)] * (length - len(offsets))
    return padding + offsets if side == "left" else offsets + padding


__all__ = ["ImageTextProcessor"]
