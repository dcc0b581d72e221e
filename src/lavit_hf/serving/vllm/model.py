"""The model of LaVIT in vLLM: transformers' visual tokenizer before vLLM's own language model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .processor import LavitDummyInputs, LavitMultiModalProcessor, LavitProcessingInfo

logger = init_logger(__name__)


@MULTIMODAL_REGISTRY.register_processor(
    LavitMultiModalProcessor, info=LavitProcessingInfo, dummy_inputs=LavitDummyInputs
)
class LavitForVllm(nn.Module, SupportsMultiModal):
    """Reads pictures and text, and writes text: ids of pictures are never written.

    Raises:
        ValueError: The head of the language model has a bias, which none of vLLM's has.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.visual_tokenizer.": "visual_tokenizer.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture where the chat template does not say."""
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        text, visual = config.text_config, config.visual_tokenizer_config
        if config.lm_head_bias:
            raise ValueError("The head of this LaVIT's language model has a bias, which vLLM's models have not.")
        text.tie_word_embeddings = config.tie_word_embeddings
        methods: Any = self  # without vLLM, those of its protocol look like parts of a module to mypy
        methods.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=[config.image_token_id])
        with methods._mark_tower_model(vllm_config, "image"):
            self.visual_tokenizer = LavitVisualTokenizer(visual)
            for name, module in self.visual_tokenizer.named_modules():
                if name.split(".")[-1] in LavitVisualTokenizer._keep_in_fp32_modules_strict:
                    module.float()
            self.multi_modal_projector = nn.Linear(visual.hidden_size, text.hidden_size)
        with methods._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        never_written = torch.tensor(sorted({*config.visual_token_ids, config.image_token_id}))
        self._never_written = never_written[never_written < text.vocab_size]
        chosen = json.dumps({"selection": config.visual_tokenizer_config.selection})
        logger.info_once(
            "LaVIT's pictures become a fixed number of tokens, by default a third of their patches. A checkpoint that "
            "was not trained with budgets reads better with --mm-processor-kwargs '%s', which runs the visual "
            "tokenizer in the front end.",
            chosen,
        )

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | list[torch.Tensor] | None = None,
        image_ids: torch.Tensor | list[torch.Tensor] | None = None,
        num_tokens: torch.Tensor | None = None,
        is_discrete: torch.Tensor | None = None,
        **kwargs: object,
    ) -> list[torch.Tensor]:
        """Embeds pictures that came in one form.

        Args:
            pixel_values: `[images, channels, height, width]`, to become `num_tokens` each; or else
            image_features: What the visual tokenizer made of them, `[total tokens, vision hidden]`; or else
            image_ids: Their codes as ids, `[total tokens]`.
            num_tokens: `[images]`.
            is_discrete: Which of the pictures of `pixel_values` become codes, `[images]`.
            kwargs: Nothing.

        Returns:
            `[tokens, text hidden]` for each.
        """
        if num_tokens is None:
            return []
        counts = num_tokens.flatten().tolist()
        if pixel_values is not None:
            assert is_discrete is not None
            return self._encode(pixel_values, num_tokens.flatten(), is_discrete.flatten())
        if image_ids is not None:
            return list(self.language_model.embed_input_ids(_joined(image_ids)).split(counts))
        return list(self._project(_joined(image_features)).split(counts))

    def _encode(self, pixels: torch.Tensor, counts: torch.Tensor, is_discrete: torch.Tensor) -> list[torch.Tensor]:
        """Pictures of both modes, each with a fixed number of tokens."""
        embedded: dict[int, torch.Tensor] = {}
        for discrete in (False, True):
            chosen = (is_discrete == discrete).nonzero().flatten()
            if not len(chosen):
                continue
            chosen_pixels, budget = pixels[chosen.to(pixels.device)], counts[chosen].to(pixels.device)
            if discrete:
                codes = self.visual_tokenizer.encode(chosen_pixels, num_tokens=budget).codes
                assert codes is not None
                rows = self.language_model.embed_input_ids(codes + self.config.visual_token_offset)
            else:
                rows = self._project(self.visual_tokenizer.embed(chosen_pixels, num_tokens=budget).features)
            embedded.update(zip(chosen.tolist(), rows.split(counts[chosen].tolist()), strict=True))
        return [embedded[index] for index in range(len(counts))]

    def _project(self, features: torch.Tensor | None) -> torch.Tensor:
        assert features is not None
        return self.multi_modal_projector(features.to(self.multi_modal_projector.weight.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """States of the language model."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of text."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            self._never_written = self._never_written.to(logits.device)
            logits.index_fill_(-1, self._never_written, -torch.inf)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the weights of a checkpoint."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _joined(values: Any) -> torch.Tensor:
    return torch.cat(list(values)) if isinstance(values, list | tuple) else values


__all__ = ["LavitForVllm"]
