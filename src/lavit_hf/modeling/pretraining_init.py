"""Where the weights of stage 1 come from: a vision encoder, or a tokenizer that was trained before."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_lavit import LavitPreTrainingConfig
from .modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .vision_text_configs import build_visual_config
from .vision_text_init import load_visual_part


def build_pretraining_model(
    model_class: Any,
    source: str | os.PathLike | None,
    vision_model: PreTrainedModel | None,
    token_decoder: LavitTokenDecoder | None,
    visual_tokenizer_config: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """See [`LavitVisualTokenizerForPreTraining.from_vision_pretrained`]."""
    part = load_visual_part(source, None, model=vision_model)
    is_trained = isinstance(part, LavitVisualTokenizer)
    # Stage 2 gives the continuous branch weights of its own, which start as those of this one.
    visual_config = build_visual_config(part.config, **{"share_branches": True, **visual_tokenizer_config})
    if token_decoder is not None:
        if not is_trained:
            raise ValueError("A token_decoder belongs to a trained visual tokenizer, not to a new one.")
        kwargs["token_decoder_config"] = token_decoder.config
    if is_trained:
        # What a tokenizer has learned stays: where it looks, and its codes.
        learned = {"bypass_merger_steps": 0, "selector_steps": 0, "quantize_after_steps": 0, "kmeans_init": False}
        kwargs = {**learned, **kwargs}
    model = model_class(LavitPreTrainingConfig(visual_tokenizer_config=visual_config, **kwargs))
    if is_trained:
        weights = {name: tensor for name, tensor in part.state_dict().items() if not name.startswith("continuous.")}
        _load(model.visual_tokenizer, weights)
        if token_decoder is not None:
            _check_codebooks(part, token_decoder)
            _load(model.token_decoder, token_decoder.state_dict())
    else:
        _load(model.visual_tokenizer.vision_model, part.state_dict())
    return model


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = module.load_state_dict(weights, strict=False)  # LaVIT leaves out layers after an encoder's features
    missing = [name for name in found.missing_keys if not name.startswith("continuous.")]
    if missing:
        raise ValueError(f"The model lacks weights of {type(module).__name__}: {', '.join(missing[:5])}.")


def _check_codebooks(tokenizer: LavitVisualTokenizer, decoder: LavitTokenDecoder) -> None:
    quantizer = tokenizer.discrete.quantizer
    assert quantizer is not None
    if not torch.equal(quantizer.codebook.weight.cpu(), decoder.codebook.weight.cpu()):
        raise ValueError("Visual tokenizer and token decoder have different codebooks: they do not belong together.")
