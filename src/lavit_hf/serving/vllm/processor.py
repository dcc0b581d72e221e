"""The front end of LaVIT in vLLM: pixels, and which ids stand for a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)

from ...processing.processing_lavit import ImageTextProcessor
from .requests import PictureOptions, place_pictures, read_options


class LavitProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about LaVIT's inputs."""

    @cached_property
    def processor(self) -> ImageTextProcessor:
        config = self.ctx.model_config
        return ImageTextProcessor.from_pretrained(config.model, revision=config.revision)

    def get_hf_processor(self, **kwargs: object) -> ImageTextProcessor:
        # Options of a request are of its call: the processor that vLLM would make takes them for its own.
        return self.processor

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}  # of one kind, all of them

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.processor.image_seq_length + 2}

    def read_options(self, request: Mapping[str, Any], num_images: int) -> PictureOptions:
        """How the pictures of a request are read."""
        server = self.ctx.get_mm_config().mm_processor_kwargs or {}
        processor = self.processor
        return read_options(request, server, num_images, processor.image_seq_length, processor.visual_mode)


class LavitDummyInputs(BaseDummyInputsBuilder[LavitProcessingInfo]):
    """The largest inputs, for which vLLM reserves memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.processor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        size = self.info.processor.image_processor.size
        side = {"width": size["width"], "height": size["height"]}
        return {"image": self._get_dummy_images(**side, num_images=mm_counts.get("image", 0))}


class LavitMultiModalProcessor(BaseMultiModalProcessor[LavitProcessingInfo]):
    """Puts ids into prompts where pictures go.

    A picture is its pixels and a number of tokens, which the model computes; or what the visual tokenizer makes of it
    here, features or codes, where the picture decides how many they are.
    """

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As everywhere, with the options of the server, and a placeholder for every picture.

        Raises:
            ValueError: An option cannot be had, or a text spells the placeholder.
        """
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        options = self.info.read_options(inputs.hf_processor_mm_kwargs, count).to_dict()
        prompt = place_pictures(inputs.prompt, self.info.get_tokenizer(), self.info.processor.image_token, count)
        return super().apply(replace(inputs, prompt=prompt, hf_processor_mm_kwargs=options), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor, images = self.info.processor, list(hf_data["images"])  # type: ignore[call-overload]
        options = PictureOptions(
            hf_kwargs.get("num_image_tokens"), hf_kwargs.get("selection"), hf_kwargs["visual_mode"]
        )
        is_discrete = torch.tensor([options.visual_mode == "discrete"] * len(images))
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if options.num_tokens is not None:
            counts = torch.full((len(images),), options.num_tokens)
            return BatchFeature({"pixel_values": pixel_values, "num_tokens": counts, "is_discrete": is_discrete})
        visual_tokenizer = processor.get_visual_tokenizer()
        with torch.inference_mode():
            encode = visual_tokenizer.encode if options.visual_mode == "discrete" else visual_tokenizer.embed
            output = encode(pixel_values, selection=options.selection)
        # Plain tensors: those of the inference mode cannot be shared between processes.
        encoded = (
            {"image_ids": processor.tokenizer.convert_codes_to_ids(output.codes).clone()}
            if options.visual_mode == "discrete"
            else {"image_features": output.features.clone()}
        )
        return BatchFeature({**encoded, "num_tokens": output.num_tokens.clone(), "is_discrete": is_discrete})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        counts = hf_inputs.get("num_tokens", torch.empty(0, dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "image_features": MultiModalFieldConfig.flat_from_sizes("image", counts),
            "image_ids": MultiModalFieldConfig.flat_from_sizes("image", counts),
            "num_tokens": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "is_discrete": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        tokenizer = self.info.processor.tokenizer
        placeholder = tokenizer.image_token_id

        def replacement(index: int) -> PromptUpdateDetails:
            count = int(out_mm_kwargs["image"][index]["num_tokens"].data)
            ids = tokenizer.add_image_start_and_end([placeholder] * count)
            return PromptUpdateDetails.select_token_id(ids, placeholder)

        return [PromptReplacement(modality="image", target=[placeholder], replacement=replacement)]


__all__ = ["LavitDummyInputs", "LavitMultiModalProcessor", "LavitProcessingInfo"]
