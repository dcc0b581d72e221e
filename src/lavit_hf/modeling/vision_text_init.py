"""The weights of a new LaVIT: those of a vision encoder and a language model, and new ones between them."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .checkpoint_files import _HUB_KWARGS
from .configuration_lavit import LavitConfig, LavitVisualTokenizerConfig
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer, without_pooler
from .vision_resizing import resize_vision_model
from .vision_text_configs import build_on_meta, check_language_model, check_vision_model, find_visual_config

logger = logging.get_logger(__name__)

Source = str | os.PathLike | None
_TOLERANCE = 0.05  # relative; half precision rounds differently from one code path to another


def take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Removes arguments such as `text_revision` from `kwargs`, and returns them without their prefix."""
    names = [name for name in kwargs if name.startswith(prefix)]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}


def load_language_model(source: Source, **kwargs: Any) -> PreTrainedModel:
    """The language model to build on, checked.

    Args:
        source: Directory or Hub id.
        kwargs: For `AutoModelForCausalLM.from_pretrained`; or `model`, one that is loaded already.

    Raises:
        TypeError: If `model` is none.
        ValueError: If it is no decoder, or there is no language model given.
    """
    model = kwargs.pop("model", None)
    if model is None:
        if source is None:
            raise ValueError("Pass the language model: a directory or Hub id, or `text_model`.")
        config = kwargs.pop("config", None)
        config = _load_config(source, kwargs) if config is None else config
        build_on_meta(config)  # a clear error before gigabytes are read
        model = AutoModelForCausalLM.from_pretrained(source, config=config, **kwargs)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(
            f"text_model must be a language model with a head (AutoModelForCausalLM), got {type(model).__name__}."
        )
    check_language_model(model)
    return model


def load_visual_part(source: Source, visual_tokenizer: Source | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A trained visual tokenizer, or a vision encoder to build a new one around.

    Args:
        source: Directory or Hub id of a vision encoder, of a model that has one, or of a visual tokenizer.
        visual_tokenizer: A trained visual tokenizer (or a model that has one), or its directory or Hub id.
        kwargs: For `from_pretrained`; or `model`, one that is loaded already.

    Raises:
        TypeError: If an object is no model.
        ValueError: If both or none are given, the encoder does not suit, or its checkpoint lacks weights.
    """
    model = kwargs.pop("model", None)
    if sum(given is not None for given in (source, visual_tokenizer, model)) != 1:
        raise ValueError("Pass exactly one of: a vision model's directory or Hub id, vision_model, visual_tokenizer.")
    if visual_tokenizer is not None and not isinstance(visual_tokenizer, (str, os.PathLike)):
        model = visual_tokenizer
    if model is not None:
        part = _find_visual_module(model)
        if visual_tokenizer is not None and not isinstance(part, LavitVisualTokenizer):
            raise TypeError(f"{type(visual_tokenizer).__name__} is and has no LavitVisualTokenizer.")
        return part
    path = source if visual_tokenizer is None else visual_tokenizer
    if _holds_visual_tokenizer(path, kwargs):
        return LavitVisualTokenizer.from_pretrained(path, **kwargs)
    if visual_tokenizer is not None:
        raise ValueError(f"{path} holds no LavitVisualTokenizer. Pass a bare vision encoder as the first argument.")
    config = find_visual_config(kwargs.pop("config", None) or _load_config(path, kwargs))
    check_vision_model(config)
    return _load_vision_model(path, config, kwargs)


def build_lavit(
    model_class: type[PreTrainedModel],
    config: LavitConfig,
    visual_part: PreTrainedModel,
    language_model: PreTrainedModel,
    mean_resizing: bool,
) -> Any:
    """Builds the model. The parts are taken over, not copied: its weights are theirs.

    Args:
        model_class: [`LavitForConditionalGeneration`].
        config: Its configuration.
        visual_part: See [`load_visual_part`].
        language_model: See [`load_language_model`]; its embeddings grow.
        mean_resizing: See `resize_token_embeddings`.

    Raises:
        ValueError: If weights do not fit, or the language model's logits cannot be reproduced.
    """
    language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=mean_resizing)
    state_dict = _visual_weights(visual_part, config.visual_tokenizer_config.share_branches)
    state_dict |= _text_weights(language_model, config.tie_word_embeddings)
    dtype = language_model.get_input_embeddings().weight.dtype
    # What is missing here is new, and gets its initialization from the classes.
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    new = ("model.multi_modal_projector.", "model.visual_tokenizer.discrete.", "model.visual_tokenizer.continuous.")
    wrong = [name for name in info["missing_keys"] if not name.startswith(new)]
    # Of the vision encoder, LaVIT leaves the layers after its features.
    unused = "model.visual_tokenizer.vision_model."
    wrong += [name for name in info["unexpected_keys"] if not name.startswith(unused)]
    wrong += map(str, info["mismatched_keys"])
    if wrong:
        raise ValueError(f"The weights of these models do not fit together as a LaVIT: {', '.join(wrong[:5])}.")
    _keep_in_fp32(model)
    model.name_or_path = model.config.name_or_path = ""
    model.generation_config = _generation_ids(language_model)
    _check_logits(model, language_model)
    if info["missing_keys"]:
        parts = [part for part in new if any(name.startswith(part) for name in info["missing_keys"])]
        logger.warning(
            "Newly initialized, and of no use before they are trained: the embeddings of visual ids, "
            f"{', '.join(part.removeprefix('model.').rstrip('.') for part in parts)}."
        )
    return model


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Does for new weights what `from_pretrained` does for loaded ones."""
    for name, parameter in model.named_parameters():
        if not model._keep_in_fp32_modules_strict.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()


def _load_config(source: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    names = (*_HUB_KWARGS, "trust_remote_code")
    return AutoConfig.from_pretrained(source, **{name: kwargs[name] for name in names if name in kwargs})


def _holds_visual_tokenizer(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint is that of a visual tokenizer or of any model with one, those of stage 1 included."""
    located = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(source, **located)
    key = LavitVisualTokenizerConfig.base_config_key
    return key in values or values.get("model_type") == LavitVisualTokenizerConfig.model_type


def _find_visual_module(model: Any) -> PreTrainedModel:
    """The visual tokenizer of a model, or else its vision encoder."""
    if isinstance(model, LavitVisualTokenizer):
        return model
    for name in ("visual_tokenizer", "vision_model"):
        if isinstance(part := getattr(model, name, None), PreTrainedModel):
            return part
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Expected a vision model or a visual tokenizer, got {type(model).__name__}.")
    return model


def _load_vision_model(source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    loader: Any = AutoModel
    image_size = kwargs.pop("image_size", config.image_size)
    if config.model_type == "blip_2_vision_model":
        from transformers import Blip2VisionModel

        # transformers finds the encoder in checkpoints of CLIP and SigLIP by itself, but not in those of BLIP-2.
        loader, kwargs = Blip2VisionModel, {"key_mapping": {r"^vision_model\.": ""}, **kwargs}
    elif config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    model, info = loader.from_pretrained(
        source, config=config, output_loading_info=True, **without_pooler(config), **kwargs
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights of its vision encoder: {', '.join(sorted(info['missing_keys'])[:5])}."
        )
    return resize_vision_model(model, image_size)


def _visual_weights(part: PreTrainedModel, share_branches: bool) -> dict[str, torch.Tensor]:
    prefix = "model.visual_tokenizer."
    if not isinstance(part, LavitVisualTokenizer):
        prefix += "vision_model."
        return {prefix + name: tensor for name, tensor in part.state_dict().items()}
    weights = part.state_dict()
    if share_branches:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("continuous.")}
    elif part.continuous is None:
        # Stage 2 goes on from what stage 1 has learned.
        shared = {name: tensor for name, tensor in weights.items() if name.startswith("discrete.")}
        shared = {name: tensor for name, tensor in shared.items() if not name.startswith("discrete.quantizer.")}
        weights |= {name.replace("discrete.", "continuous.", 1): tensor.clone() for name, tensor in shared.items()}
    return {prefix + name: tensor for name, tensor in weights.items()}


def _text_weights(model: PreTrainedModel, is_tied: bool) -> dict[str, torch.Tensor]:
    weights = {f"model.language_model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    head = model.get_output_embeddings().state_dict()
    if is_tied:
        del head["weight"]
    return weights | {f"lm_head.{name}": tensor for name, tensor in head.items()}


def _generation_ids(model: PreTrainedModel) -> GenerationConfig:
    """The special ids for generation; sampling options of the language model alone do not carry over."""
    stored = model.generation_config
    ids = {name: getattr(stored, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: getattr(model.config, name, None) if value is None else value for name, value in ids.items()}
    eos = ids["eos_token_id"]
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(**ids)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, language_model: PreTrainedModel) -> None:
    """Some language models scale embeddings or logits in ways of their own: better an error than wrong numbers."""
    ids = torch.arange(2, device=model.device)[None]
    modes = [part.training for part in (model, language_model)]
    expected = language_model.eval()(input_ids=ids).logits.float()
    actual = model.eval()(input_ids=ids).logits.float()
    for part, mode in zip((model, language_model), modes, strict=True):
        part.train(mode)
    if not (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max():  # which NaN is not, either
        raise ValueError(
            f"LaVIT's logits are not those of {type(language_model).__name__}: it does something to its embeddings or "
            "logits that LaVIT does not know. Use another language model."
        )
