"""Configurations, inferred from the shapes of the original's tensors and the language model's own configuration."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..modeling.checkpoint_files import check_counts
from ..modeling.configuration_lavit import LavitConfig, LavitTokenDecoderConfig, LavitVisualTokenizerConfig
from . import names
from .weight_files import ConversionError, TensorInfo

Headers = Mapping[str, Mapping[str, TensorInfo]]

# What neither shapes nor files tell; the original's constants.
_VISION_EPS = 1e-6
_MERGER_EPS = 1e-5
_SMOOTHING = 1e-6


@dataclass
class Configs:
    """The configurations of everything a checkpoint converts to. A missing pixel decoder has none."""

    model: LavitConfig
    token_decoders: dict[str, LavitTokenDecoderConfig]


def infer_configs(headers: Headers, text_config: Mapping, heads: Mapping[str, int] | str | None) -> Configs:
    """Reads every dimension off the tensors' shapes; those of the language model are in `text_config`.

    Returns:
        The configurations. Only the text tokenizer tells the `image_token_id`, which is still to be set.
    """
    decoders = {names.HIGHRES: names.HIGHRES_DECODER, names.LOWRES: names.LOWRES_DECODER}
    decoders = {model: file for model, file in decoders.items() if file in headers}
    encoder = headers[names.ENCODER]
    width = _size(encoder, r"blocks\.\d+\.norm1\.weight|cls_token|norm\.weight", -1, names.ENCODER)
    counts = resolve_heads(width, heads, ["vision", "merger", *(["decoder"] if decoders else [])])
    visual = LavitVisualTokenizerConfig(
        vision_config=_vision(encoder, width, counts["vision"]),
        selection="expected",  # the original samples, and argmax may keep far less than that does
        **_merger(headers[names.STAGE1], counts["merger"]),
    )
    text = _text(text_config)
    if names.LANGUAGE_MODEL in headers:
        try:
            check_counts(text_config, len(headers[names.LANGUAGE_MODEL]), "language_model/config.json")
        except ValueError as error:
            raise ConversionError(str(error)) from error
    text_vocab = text.vocab_size - 2 - visual.codebook_size
    if text_vocab < 1:
        raise ConversionError(
            f"The language model's vocabulary ({text.vocab_size}) is smaller than the codebook "
            f"({visual.codebook_size} rows) plus image start and end."
        )
    model = LavitConfig(
        text_config=text,
        visual_tokenizer_config=visual,
        boi_token_id=text_vocab,
        eoi_token_id=text_vocab + 1,
        visual_token_offset=text_vocab + 2,
        architectures=["LavitForConditionalGeneration"],
    )
    files = (names.ENCODER, names.STAGE1, names.STAGE2, names.LANGUAGE_MODEL)
    # What `from_pretrained` loads with unless told otherwise: the dtype that most parameters are stored in.
    set_dtype(model, _main_dtype([info for file in files for info in headers.get(file, {}).values()]))
    token_decoders = {
        model_name: _token_decoder(headers[file], visual, counts["decoder"], file)
        for model_name, file in decoders.items()
    }
    if names.LOWRES in token_decoders and names.UNCONDITIONAL in headers:
        lowres = token_decoders[names.LOWRES]
        rows = _size(headers[names.UNCONDITIONAL], "uncond_embeddings", -2, names.UNCONDITIONAL)
        if rows > lowres.num_queries:
            raise ConversionError(
                f"{names.UNCONDITIONAL}: {rows} rows, but the token decoder has only {lowres.num_queries} queries."
            )
        lowres.num_negative_tokens = rows
    return Configs(model, token_decoders)


def _vision(encoder: Mapping[str, TensorInfo], width: int, heads: int) -> dict:
    patch = _size(encoder, r"patch_embed\.proj\.weight", -1, names.ENCODER)
    positions = _size(encoder, r"pos_embed", 1, names.ENCODER)
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1 or not side:
        raise ConversionError(
            f"{names.ENCODER}: pos_embed has {positions} positions; expected 1 plus a square number of patches."
        )
    return {
        "model_type": "blip_2_vision_model",
        "hidden_size": width,
        "intermediate_size": _size(encoder, r"blocks\.\d+\.mlp\.fc1\.(weight|bias)", 0, names.ENCODER),
        "num_hidden_layers": _blocks(encoder, "", names.ENCODER),
        "num_attention_heads": heads,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": _VISION_EPS,
        "initializer_range": 0.02,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }


def _merger(stage1: Mapping[str, TensorInfo], heads: int) -> dict:
    return {
        "merger_num_layers": _blocks(stage1, r"causal_encoder\.", names.STAGE1),
        "merger_num_heads": heads,
        "merger_intermediate_size": _size(
            stage1, r"causal_encoder\.blocks\.\d+\.mlp\.fc1\.(weight|bias)", 0, names.STAGE1
        ),
        "layer_norm_eps": _MERGER_EPS,
        "attention_smoothing": _SMOOTHING,
        "codebook_size": _size(stage1, r"quantize\.embedding\.weight", 0, names.STAGE1),
        "codebook_dim": _size(stage1, r"encode_task_layer\.2\.(weight|bias)", 0, names.STAGE1),
        "share_branches": False,
    }


def _token_decoder(
    decoder: Mapping[str, TensorInfo], visual: LavitVisualTokenizerConfig, heads: int, file: str
) -> LavitTokenDecoderConfig:
    highres = file == names.HIGHRES_DECODER
    heads_of_unet = ["unet_proj_1", "unet_proj_2"] if highres else ["unet_proj"]
    config = LavitTokenDecoderConfig(
        codebook_size=visual.codebook_size,
        codebook_dim=visual.codebook_dim,
        hidden_size=visual.hidden_size,
        num_layers=_blocks(decoder, "", file),
        num_heads=heads,
        intermediate_size=_size(decoder, r"blocks\.\d+\.mlp\.fc1\.(weight|bias)", 0, file),
        num_queries=_size(decoder, r"pos_embed|query_embed", 1, file),
        output_size=_size(decoder, r"decode_task_layer\.2\.(weight|bias)", 0, file),
        cross_attention_dims=[_size(decoder, rf"{head}\.(weight|bias)", 0, file) for head in heads_of_unet],
        pooled_size=_size(decoder, r"unet_attnpool\.c_proj\.(weight|bias)", 0, file) if highres else None,
        layer_norm_eps=_MERGER_EPS,
        architectures=["LavitTokenDecoder"],
    )
    config.dtype = _main_dtype(decoder.values())
    return config


def _text(stored: Mapping) -> PreTrainedConfig:
    fields = {key: value for key, value in stored.items() if key not in ("architectures", "_name_or_path")}
    try:
        text = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError, TypeError) as error:
        raise ConversionError(f"language_model/config.json is no configuration of a known model: {error}") from error
    if getattr(text, "vocab_size", None) is None:
        raise ConversionError("language_model/config.json has no vocab_size.")
    return text


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype | None) -> None:
    """Sets the dtype of a configuration and of all its parts."""
    config.dtype = dtype
    for part in getattr(config, "sub_configs", {}):
        set_dtype(getattr(config, part), dtype)


def _main_dtype(infos: Iterable[TensorInfo]) -> torch.dtype | None:
    sizes: Counter[torch.dtype] = Counter()
    for info in infos:
        if info.dtype is not None and info.dtype.is_floating_point:
            sizes[info.dtype] += info.numel
    return sizes.most_common(1)[0][0] if sizes else None


def _blocks(headers: Mapping[str, TensorInfo], prefix: str, file: str) -> int:
    numbers = [int(match[1]) for name in headers if (match := re.match(rf"{prefix}blocks\.(\d+)\.", name))]
    if not numbers:
        raise ConversionError(f"{file} has no tensors named {prefix}blocks.*".replace("\\", ""))
    return max(numbers) + 1


def _size(headers: Mapping[str, TensorInfo], pattern: str, dim: int, file: str) -> int:
    """The size most of the matching tensors have in a dimension, so that one misshapen tensor is found out later."""
    shapes = [info.shape for name, info in headers.items() if re.fullmatch(pattern, name)]
    sizes = Counter(shape[dim] for shape in shapes if -len(shape) <= dim < len(shape))
    if not sizes:
        wanted = re.sub(r"\\d\+", "*", pattern).replace("\\", "")
        raise ConversionError(f"{file} has no usable tensor {wanted}, which the configuration is read from.")
    return sizes.most_common(1)[0][0]


# Numbers of attention heads, which no tensor shape tells.


PUBLISHED_WIDTH = 1408
PUBLISHED_HEADS = {"vision": 16, "merger": 16, "decoder": 16}


def parse_heads(text: str) -> dict[str, int]:
    """Parses `"vision=16,merger=16,decoder=16"`."""
    heads: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, _, number = (piece.strip() for piece in item.partition("="))
        if part in heads:
            raise ConversionError(f"--heads names {part} twice.")
        if not number.isdecimal():
            raise ConversionError(f"--heads: expected PART=NUMBER as in vision=16,merger=16,decoder=16, got {item!r}.")
        heads[part] = int(number)
    return heads


def resolve_heads(width: int, heads: Mapping[str, int] | str | None, parts: list[str]) -> dict[str, int]:
    """Fills in the published numbers at the published width and insists on explicit ones at any other."""
    given = parse_heads(heads) if isinstance(heads, str) else dict(heads or {})
    if unknown := sorted(set(given) - set(PUBLISHED_HEADS)):
        raise ConversionError(f"--heads: unknown part {', '.join(unknown)}; known are vision, merger and decoder.")
    known = {**PUBLISHED_HEADS, **given} if width == PUBLISHED_WIDTH else given
    if missing := [part for part in parts if part not in known]:
        example = ",".join(f"{part}=4" for part in parts)
        raise ConversionError(
            f"The numbers of attention heads cannot be read off the tensors, and at a width of {width} (the published "
            f"checkpoints have {PUBLISHED_WIDTH}) there is no default. Missing: {', '.join(missing)}. Pass them, for "
            f"example --heads {example}"
        )
    for part in parts:
        if known[part] < 1 or width % known[part]:
            raise ConversionError(f"--heads {part}={known[part]}: the width {width} is not a multiple of it.")
    return {part: known[part] for part in parts}
