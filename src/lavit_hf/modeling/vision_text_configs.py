"""The configuration of a new LaVIT out of those of a vision encoder and a language model, and which of them will do.

Models are looked at on the meta device, where they cost no memory.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_lavit import LavitVisualTokenizerConfig
from .modeling_lavit_visual_tokenizer import build_vision_model

_COMMON_FIELDS = {field.name for field in fields(PreTrainedConfig)}
_VISUAL_FIELDS = {field.name for field in fields(LavitVisualTokenizerConfig)} - _COMMON_FIELDS - {"vision_config"}
_JOINT_FIELDS = {"tie_word_embeddings", "dtype"}


def join_configs(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **kwargs: Any
) -> dict[str, PreTrainedConfig | Any]:
    """Arguments of the [`LavitConfig`] of a new LaVIT.

    Args:
        vision_config: A vision encoder's; that of a model that has one (CLIP, SigLIP, BLIP-2, ...); or that of a
            trained visual tokenizer, alone or in a whole LaVIT.
        text_config: A language model's, whose vocabulary does not count the visual ids yet.
        kwargs: Fields of [`LavitVisualTokenizerConfig`] and [`LavitConfig`].

    Raises:
        TypeError: If an argument is none of these fields.
        ValueError: If the models cannot become a LaVIT.
    """
    visual = {name: kwargs.pop(name) for name in list(kwargs) if name in _VISUAL_FIELDS}
    if unknown := sorted(set(kwargs) - _JOINT_FIELDS):
        known = ", ".join(sorted(_VISUAL_FIELDS | _JOINT_FIELDS))
        raise TypeError(f"No configuration value of a new LaVIT: {', '.join(unknown)}. There are {known}.")
    visual_config = build_visual_config(vision_config, **visual)
    language_model = build_on_meta(text_config)
    check_language_model(language_model)
    text = text_config.to_dict()
    first_visual_id = text["vocab_size"]
    text["vocab_size"] = first_visual_id + 2 + visual_config.codebook_size + 1  # the last one is the placeholder's
    return {
        "text_config": text,
        "visual_tokenizer_config": visual_config.to_dict(),
        "boi_token_id": first_visual_id,
        "lm_head_bias": language_model.get_output_embeddings().bias is not None,
        **kwargs,
    }


def build_visual_config(vision_config: PreTrainedConfig, **kwargs: Any) -> LavitVisualTokenizerConfig:
    """The configuration of a visual tokenizer around a vision encoder, or that of a trained one.

    A new one has the published depth and codebook, heads and MLPs as wide as the encoder's own, and exact attention
    (`attention_smoothing=0`: what is trained anew needs no smoothing, and skips dropped patches).

    Args:
        vision_config: See [`join_configs`].
        kwargs: Fields of [`LavitVisualTokenizerConfig`]. Of a trained visual tokenizer only `share_branches` can be
            chosen: it is what weights do not decide.

    Raises:
        ValueError: If the encoder gives no features per patch, or a field belongs to the trained visual tokenizer.
    """
    found = find_visual_config(vision_config)
    if isinstance(found, LavitVisualTokenizerConfig):
        if fixed := sorted(set(kwargs) - {"share_branches"}):
            raise ValueError(f"The trained visual tokenizer has its own {', '.join(fixed)}; leave them out.")
        # Stage 2 trains the continuous branch; codes must not change meanwhile.
        return LavitVisualTokenizerConfig(**{**found.to_dict(), "share_branches": False, **kwargs})
    check_vision_model(found)
    hidden_size = found.hidden_size
    defaults = {
        "merger_num_heads": getattr(found, "num_attention_heads", None),
        "merger_intermediate_size": getattr(found, "intermediate_size", None)
        or int(hidden_size * getattr(found, "mlp_ratio", 4)),
        "attention_smoothing": 0,
    }
    defaults = {name: value for name, value in defaults.items() if value is not None}
    vision = found.to_dict()
    if found.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False  # SigLIP's pooling of patches, which LaVIT does not use.
    return LavitVisualTokenizerConfig(vision_config=vision, **{**defaults, **kwargs})


def find_visual_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the visual tokenizer in `config`, or else that of the vision encoder."""
    if isinstance(config, LavitVisualTokenizerConfig):
        return config
    for name in ("visual_tokenizer_config", "vision_config"):
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            return part
    return config


def check_vision_model(config: PreTrainedConfig) -> None:
    """Checks that a vision encoder gives a feature for each of its patches, by running it on the meta device.

    Raises:
        ValueError: If it does not.
    """
    name = type(config).__name__
    lacking = [key for key in ("hidden_size", "image_size", "patch_size") if not getattr(config, key, None)]
    if lacking:
        raise ValueError(
            f"{name} has no {', '.join(lacking)}: LaVIT needs a plain vision transformer (ViT, CLIP, SigLIP, DINOv2, "
            "BLIP-2, ...) that gives one feature for each patch, no convolutional or hierarchical network."
        )
    trial = LavitVisualTokenizerConfig(vision_config=config.to_dict(), merger_num_heads=1, merger_num_layers=0)
    pixel_values = torch.empty(1, getattr(config, "num_channels", 3), *trial.image_size, device="meta")
    try:
        with torch.device("meta"), init.no_init_weights(), torch.no_grad():
            outputs = build_vision_model(trial.vision_config).eval()(pixel_values=pixel_values, return_dict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The vision model of {name} cannot be run on pixel values alone: {error}") from error
    shape = list(outputs.last_hidden_state.shape)
    if len(shape) != 3 or shape[1] < trial.num_patches or shape[2] != config.hidden_size:
        raise ValueError(
            f"The vision model of {name} gives features of shape {shape}, but LaVIT needs {config.hidden_size} values "
            f"for each of the {trial.num_patches} patches. Use a plain vision transformer."
        )


def build_on_meta(text_config: PreTrainedConfig) -> PreTrainedModel:
    """A language model without weights.

    Raises:
        ValueError: If the configuration is not that of a decoder.
    """
    name = type(text_config).__name__
    if getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model: LaVIT needs a decoder (Llama, GPT-2, Qwen2, ...).")
    if text_config.get_text_config() is not text_config:
        raise ValueError(
            f"{name} is a multimodal model. Pass its language model alone: its text_config, or a checkpoint that "
            "holds nothing else."
        )
    is_known = type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known and "AutoModelForCausalLM" not in (getattr(text_config, "auto_map", None) or {}):
        raise ValueError(f"{name} belongs to no language model that generates text (AutoModelForCausalLM).")
    with torch.device("meta"), init.no_init_weights():
        return AutoModelForCausalLM.from_config(text_config)


def check_language_model(model: PreTrainedModel) -> None:
    """Checks that a language model is a causal decoder with nothing but a linear head on top.

    Raises:
        ValueError: If it is not.
    """
    name, decoder = type(model).__name__, model.base_model
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise ValueError(f"{name} is an encoder, its tokens see those after them: LaVIT needs a decoder (Llama, ...).")
    accepted = inspect.signature(decoder.forward).parameters
    if decoder is model or not {"inputs_embeds", "past_key_values"} <= accepted.keys():
        raise ValueError(f"{type(decoder).__name__} takes no inputs_embeds or no past_key_values, which LaVIT needs.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The head of {name} is no linear layer but {type(head).__name__}.")
    inside = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    if outside := [key for key, parameter in model.named_parameters() if id(parameter) not in inside]:
        raise ValueError(
            f"{name} has more than a decoder and a linear head ({', '.join(outside[:3])}, ...); LaVIT would lose it."
        )
