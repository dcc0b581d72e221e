"""A new LaVIT out of any vision encoder and any decoder: configuration, weights, processor; and stage 1's model.

The classes reach this file through [`~modeling.remote_code_mixin.import_composition`], so that it does not travel with
weights. Which models will do is found out on the meta device, where they cost no memory.
"""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.utils import logging

from .modeling.cache_lavit import CACHE_NAME
from .modeling.checkpoint_files import hub_options
from .modeling.configuration_lavit import LavitConfig, LavitPreTrainingConfig, LavitVisualTokenizerConfig, as_pair
from .modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling.modeling_lavit_visual_tokenizer import (
    LavitVisualTokenizer,
    build_vision_model,
    same_codebooks,
    without_pooler,
)
from .processing.image_processing_pil_lavit import LavitImageProcessorPil
from .processing.tokenization_lavit import LavitTokenizer

if TYPE_CHECKING:
    from .modeling.modeling_lavit import LavitForConditionalGeneration

logger = logging.get_logger(__name__)

Source = str | os.PathLike | None

_COMMON_FIELDS = {field.name for field in fields(PreTrainedConfig)}
_VISUAL_FIELDS = {field.name for field in fields(LavitVisualTokenizerConfig)} - _COMMON_FIELDS - {"vision_config"}
_JOINT_FIELDS = {"tie_word_embeddings", "dtype"}

# LaVIT's logits of text may differ from the language model's by as much, relatively: half precision rounds differently
# from one code path to another.
_TOLERANCE = 0.05
# What the encoder was trained with. Its sizes and crops are not taken over: LaVIT sees whole pictures, squashed.
_STATISTICS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")


# The configuration.


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
    # Whoever decides about it decides against the language model, too.
    text |= {name: value for name, value in kwargs.items() if name == "tie_word_embeddings"}
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
    (`attention_smoothing=0`: what is trained anew needs no smoothing, and skips dropped patches). Of a trained one
    only `share_branches` can be chosen: it is what weights do not decide.
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
    """Checks that a vision encoder gives a feature for each of its patches, by running it on the meta device."""
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
    """A language model without weights, of the configuration of a decoder."""
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
    """Checks that a language model is a causal decoder with nothing but a linear head on top."""
    name, decoder = type(model).__name__, model.base_model
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise ValueError(f"{name} is an encoder, its tokens see those after them: LaVIT needs a decoder (Llama, ...).")
    if decoder is model:
        raise ValueError(f"{name} has no decoder apart from its head (`base_model`), which LaVIT needs.")
    if all(DynamicCache(config=model.config).is_linear):
        raise ValueError(f"{name} has no attention, so that empty positions cannot be hidden: LaVIT needs a decoder.")
    accepted = inspect.signature(decoder.forward).parameters
    if missing := sorted({"inputs_embeds", "attention_mask", CACHE_NAME} - accepted.keys()):
        raise ValueError(f"{type(decoder).__name__} takes no {' and no '.join(missing)}, which LaVIT needs.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The head of {name} is no linear layer but {type(head).__name__}.")
    inside = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    if outside := [key for key, parameter in model.named_parameters() if id(parameter) not in inside]:
        raise ValueError(
            f"{name} has more than a decoder and a linear head ({', '.join(outside[:3])}, ...); LaVIT would lose it."
        )


# The parts.


def load_language_model(source: Source, **kwargs: Any) -> PreTrainedModel:
    """The language model to build on, checked; loaded unless it is given as `model`."""
    model = kwargs.pop("model", None)
    if model is None:
        if source is None:
            raise ValueError("Pass the language model: a directory or Hub id, or `text_model`.")
        config = kwargs.pop("config", None)
        config = _load_config(source, kwargs) if config is None else config
        build_on_meta(config)  # a clear error before gigabytes are read
        model = AutoModelForCausalLM.from_pretrained(source, config=config, **kwargs)
    elif isinstance(model, PreTrainedModel):
        _adapt_given(model, "text_", kwargs)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(
            f"text_model must be a language model with a head (AutoModelForCausalLM), got {type(model).__name__}."
        )
    check_language_model(model)
    return model


def _adapt_given(model: PreTrainedModel, prefix: str, options: dict[str, Any]) -> None:
    """Does with a model that is loaded already what can still be done: gives it a dtype and a kind of attention.

    Raises:
        TypeError: If there are other options, which only loading could have obeyed.
    """
    options = dict(options)
    dtype, attention = options.pop("dtype", None), options.pop("attn_implementation", None)
    if options:
        names = ", ".join(prefix + name for name in options)
        raise TypeError(f"Unknown arguments for a model that is loaded already: {names}. Load it with them.")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto" is what it has
    if dtype is not None and dtype != model.dtype:
        model.to(dtype)
    if attention is not None:
        model.set_attn_implementation(attention)


def load_visual_part(
    source: Source, visual_tokenizer: Source | PreTrainedModel = None, **kwargs: Any
) -> PreTrainedModel:
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
        _adapt_given(part, "vision_", kwargs)
        if visual_tokenizer is not None and not isinstance(part, LavitVisualTokenizer):
            raise TypeError(f"{type(visual_tokenizer).__name__} is and has no LavitVisualTokenizer.")
        return part
    path = source if visual_tokenizer is None else visual_tokenizer
    assert path is not None and not isinstance(path, PreTrainedModel)
    values, _ = PreTrainedConfig.get_config_dict(path, **hub_options(kwargs))
    # That of a visual tokenizer or of any model with one, those of stage 1 included.
    key, model_type = LavitVisualTokenizerConfig.base_config_key, LavitVisualTokenizerConfig.model_type
    if key in values or values.get("model_type") == model_type:
        return LavitVisualTokenizer.from_pretrained(path, **kwargs)
    if visual_tokenizer is not None:
        raise ValueError(f"{path} holds no LavitVisualTokenizer. Pass a bare vision encoder as the first argument.")
    config = find_visual_config(kwargs.pop("config", None) or _load_config(path, kwargs))
    check_vision_model(config)
    return _load_vision_model(path, config, kwargs)


def _load_config(source: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    trust = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    return AutoConfig.from_pretrained(source, **hub_options(kwargs), **trust)


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


# A vision encoder for images of another size.


def resize_vision_model(model: PreTrainedModel, image_size: int | tuple[int, int]) -> PreTrainedModel:
    """Returns the encoder for images of another size; its learned positions are interpolated as a picture is resized.

    Encoders with rotary positions have nothing to interpolate. Others have one learned position per patch, after those
    of class and register tokens.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    if _grid(config) == _grid(model.config):
        return model
    with torch.device("meta"), init.no_init_weights():
        resized = type(model)(config, **without_pooler(config))
    weights = model.state_dict()
    for name, expected in resized.state_dict().items():
        if expected.shape != weights[name].shape:
            weights[name] = _interpolate(name, weights[name], _grid(model.config), config)
            if expected.shape != weights[name].shape:
                raise ValueError(f"{name} of {type(model).__name__} cannot be interpolated to {image_size} pixels.")
    resized.load_state_dict(weights, strict=False, assign=True)
    return resized.eval()


def _grid(config: Any) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = as_pair(config.image_size), as_pair(config.patch_size)
    return height // patch_height, width // patch_width


def _interpolate(name: str, table: torch.Tensor, old: tuple[int, int], config: Any) -> torch.Tensor:
    """`[..., extra + old patches, width]` -> `[..., extra + new patches, width]`."""
    num_extra = table.shape[-2] - old[0] * old[1] if table.ndim >= 2 else -1
    if "position" not in name or num_extra < 0:
        raise ValueError(f"{name} depends on the image size, and is no table of positions that could be interpolated.")
    rows = table.reshape(-1, table.shape[-1])
    picture = rows[num_extra:].float().unflatten(0, old).movedim(-1, 0)[None]
    antialias = config.model_type == "dinov2_with_registers"  # as this one, alone, does by itself
    picture = F.interpolate(picture, _grid(config), mode="bicubic", align_corners=False, antialias=antialias)
    patches = picture[0].movedim(0, -1).flatten(0, 1).to(table.dtype)
    return torch.cat([rows[:num_extra], patches]).reshape(*table.shape[:-2], -1, table.shape[-1])


# The model.


def compose_model(
    model_class: type[LavitForConditionalGeneration],
    vision: Source,
    text: Source,
    visual_tokenizer: Source | PreTrainedModel,
    mean_resizing: bool,
    **kwargs: Any,
) -> Any:
    """See [`LavitForConditionalGeneration.from_vision_text_pretrained`]."""
    vision_kwargs, text_kwargs = _take_prefixed(kwargs, "vision_"), _take_prefixed(kwargs, "text_")
    if "dtype" in kwargs:
        text_kwargs.setdefault("dtype", kwargs.pop("dtype"))
    if "attn_implementation" in kwargs:
        for part_kwargs in (vision_kwargs, text_kwargs):
            part_kwargs.setdefault("attn_implementation", kwargs["attn_implementation"])
        del kwargs["attn_implementation"]
    language_model = load_language_model(text, **text_kwargs)
    vision_kwargs.setdefault("dtype", language_model.dtype)
    visual_part = load_visual_part(vision, visual_tokenizer, **vision_kwargs)
    config = LavitConfig.from_vision_text_configs(visual_part.config, language_model.config, **kwargs)
    return _join_models(model_class, config, visual_part, language_model, mean_resizing)


def _take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Removes arguments such as `text_revision` from `kwargs`, and returns them without their prefix."""
    names = [name for name in kwargs if name.startswith(prefix)]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}


def _join_models(
    model_class: type[LavitForConditionalGeneration],
    config: LavitConfig,
    visual_part: PreTrainedModel,
    language_model: PreTrainedModel,
    mean_resizing: bool,
) -> Any:
    """Builds the model. The parts are taken over, not copied: its weights are theirs, and the embeddings grow.

    Raises:
        ValueError: If weights do not fit, or the language model's logits cannot be reproduced.
    """
    encoder = visual_part.vision_model if isinstance(visual_part, LavitVisualTokenizer) else visual_part
    language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=mean_resizing)
    state_dict = _visual_weights(visual_part, config.visual_tokenizer_config.share_branches)
    state_dict |= _text_weights(language_model, config.tie_word_embeddings)
    dtype = language_model.get_input_embeddings().weight.dtype
    # What is missing here is new, and gets its initialization from the classes.
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    new = ("model.multi_modal_projector.", "model.visual_tokenizer.discrete.", "model.visual_tokenizer.continuous.")
    wrong = [name for name in info["missing_keys"] if not name.startswith(new)]
    # Of the vision encoder, LaVIT leaves the layers after its features.
    unused = "model.visual_tokenizer.vision_model."
    wrong += [name for name in info["unexpected_keys"] if not name.startswith(unused)]
    wrong += map(str, info["mismatched_keys"])
    if wrong:
        raise ValueError(f"The weights of these models do not fit together as a LaVIT: {', '.join(wrong[:5])}.")
    # As `from_pretrained` does with the weights that it finds.
    for name, parameter in model.named_parameters():
        if not set(name.split(".")).isdisjoint(model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.float()
    model.name_or_path = model.config.name_or_path = ""
    model.generation_config = _generation_ids(language_model)
    for part, source in ((model.model.language_model, language_model), (model.visual_tokenizer.vision_model, encoder)):
        part.set_attn_implementation(source.config._attn_implementation)
    _check_logits(model, language_model)
    if info["missing_keys"]:
        parts = [part for part in new if any(name.startswith(part) for name in info["missing_keys"])]
        logger.warning(
            "Newly initialized, and of no use before they are trained: the embeddings of visual ids, "
            f"{', '.join(part.removeprefix('model.').rstrip('.') for part in parts)}."
        )
    return model


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
        shared = [name for name in weights if name.startswith(("discrete.selector.", "discrete.merger."))]
        weights |= {name.replace("discrete.", "continuous.", 1): weights[name].clone() for name in shared}
    return {prefix + name: tensor for name, tensor in weights.items()}


def _text_weights(model: PreTrainedModel, is_tied: bool) -> dict[str, torch.Tensor]:
    weights = {f"model.language_model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    head = model.get_output_embeddings().state_dict()
    if is_tied:
        del head["weight"]
    elif model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        head["weight"] = head["weight"].clone()  # which a language model ties is one tensor
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


# The model of stage 1, from a vision encoder or a tokenizer that was trained before.


def compose_pretraining_model(
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
        _fill(model.visual_tokenizer, weights)
        if token_decoder is not None and isinstance(part, LavitVisualTokenizer):
            own = part.discrete.quantizer
            assert own is not None
            if not same_codebooks(own.codebook.weight, token_decoder.codebook.weight):
                raise ValueError(
                    "Visual tokenizer and token decoder have different codebooks: they do not belong together."
                )
            _fill(model.token_decoder, token_decoder.state_dict())
    else:
        _fill(model.visual_tokenizer.vision_model, part.state_dict())
    if token_decoder is None:  # so that the parts go together, should training end before tokens are quantized
        quantizer = model.visual_tokenizer.discrete.quantizer
        model.token_decoder.codebook.weight.data.copy_(quantizer.codebook.weight.data)
    return model


def _fill(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = module.load_state_dict(weights, strict=False)  # LaVIT leaves out layers after an encoder's features
    missing = [name for name in found.missing_keys if not name.startswith("continuous.")]
    if missing:
        raise ValueError(f"The model lacks weights of {type(module).__name__}: {', '.join(missing[:5])}.")


# The processor.


def compose_processor(
    processor_class: Any,
    vision: Source,
    text: Source,
    config: Any,
    image_processor: Any,
    tokenizer: Any,
    codebook_size: int | None,
    **kwargs: Any,
) -> Any:
    """See [`ImageTextProcessor.from_vision_text_pretrained`]."""
    codes = {} if codebook_size is None else {"codebook_size": codebook_size}
    config = _resolve_config(config, vision, text, **codes)
    return processor_class(
        build_image_processor(image_processor or vision, config),
        build_tokenizer(tokenizer or text, config),
        image_seq_length=config.visual_tokenizer_config.num_patches,
        **kwargs,
    )


def _resolve_config(config: Any, vision: Source, text: Source, **kwargs: Any) -> LavitConfig:
    """The configuration that a processor has to fit: that of a model, or one made as the model's is."""
    if config is None:
        if vision is None or text is None:
            raise ValueError("Pass `config=model.config`, or both the vision model and the language model.")
        return LavitConfig.from_vision_text_configs(
            AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(text), **kwargs
        )
    config = getattr(config, "config", config)
    if not isinstance(config, LavitConfig):
        raise TypeError(f"`config` must be a LavitConfig or a model that has one, got {type(config).__name__}.")
    if kwargs:
        raise ValueError(f"Got both `config` and {', '.join(sorted(kwargs))}, which it holds already.")
    return config


def build_image_processor(source: Any, config: LavitConfig) -> LavitImageProcessorPil:
    """LaVIT's image processor with the statistics of a vision encoder's own.

    Args:
        source: The vision encoder's image processor, or its directory or Hub id.
        config: Its vision encoder gives the image size.

    Raises:
        ValueError: If there is no image processor.
    """
    if source is None:
        raise ValueError("Pass the vision model's directory or Hub id, or `image_processor`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoImageProcessor.from_pretrained(source)
    values = {name: getattr(source, name, None) for name in _STATISTICS}
    height, width = config.visual_tokenizer_config.image_size
    return LavitImageProcessorPil(
        size={"height": height, "width": width},
        **{name: value for name, value in values.items() if value is not None},
    )


def build_tokenizer(source: Any, config: LavitConfig) -> LavitTokenizer:
    """The language model's tokenizer with the visual vocabulary behind all rows of its embedding table.

    Raises:
        ValueError: If there is no tokenizer, or it has more ids than the language model.
    """
    if source is None:
        raise ValueError("Pass the language model's directory or Hub id, or `tokenizer`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoTokenizer.from_pretrained(source)
    if isinstance(source, LavitTokenizer) or not isinstance(source, PreTrainedTokenizerBase):
        raise ValueError(f"Expected a text tokenizer of transformers, got {type(source).__name__}.")
    last_id = max(source.get_vocab().values())
    if last_id >= config.boi_token_id:
        raise ValueError(
            f"The text tokenizer has ids up to {last_id}, but the language model embeds {config.boi_token_id} only. "
            "Resize its embeddings first (`resize_token_embeddings`), or use its own tokenizer."
        )
    return LavitTokenizer.from_text_tokenizer(
        source,
        config.visual_tokenizer_config.codebook_size,
        text_vocab_size=config.boi_token_id,
        image_token_id=config.image_token_id,
    )
