"""One table of tensor names for both directions: original layout <-> the models of this library.

A pattern may hold `{n}` (a block number), `{p}` (`weight` or `bias`) and `{rest}` (anything). What stands after `#` in
a target says how the original stores the tensor:

- `#query`, `#value`: the original has a bias for queries and one for values. They are the first and the last third of
  the packed bias; the middle third, the keys' bias, is zero.
- `#batched`: the original has a leading dimension of 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# The files of the original layout, without their ending: each may be a pickle or safetensors, and sharded.
ENCODER = "visual_tokenizer/eva_vitg_psz14"
STAGE1 = "visual_tokenizer/tokenizer_encoder"
STAGE2 = "language_model/visual_weight"
LANGUAGE_MODEL = "language_model/model"
LOWRES_DECODER = "visual_tokenizer/tokenizer_decoder"
HIGHRES_DECODER = "visual_tokenizer/highres_tokenizer_decoder"
UNCONDITIONAL = "pixel_decoding/uncond_embeddings"  # the low-resolution decoder's negative condition

# The models of the converted directory, by their folder.
MODEL = ""
HIGHRES = "token_decoder"
LOWRES = "lowres/token_decoder"

_VISION_ENCODER = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.{p}": "embeddings.patch_embedding.{p}",
    "blocks.{n}.norm1.{p}": "encoder.layers.{n}.layer_norm1.{p}",
    "blocks.{n}.norm2.{p}": "encoder.layers.{n}.layer_norm2.{p}",
    "blocks.{n}.attn.qkv.weight": "encoder.layers.{n}.self_attn.qkv.weight",
    "blocks.{n}.attn.q_bias": "encoder.layers.{n}.self_attn.qkv.bias#query",
    "blocks.{n}.attn.v_bias": "encoder.layers.{n}.self_attn.qkv.bias#value",
    "blocks.{n}.attn.proj.{p}": "encoder.layers.{n}.self_attn.projection.{p}",
    "blocks.{n}.mlp.fc1.{p}": "encoder.layers.{n}.mlp.fc1.{p}",
    "blocks.{n}.mlp.fc2.{p}": "encoder.layers.{n}.mlp.fc2.{p}",
}

_SELECTOR = {
    "in_conv.0.{p}": "norm.{p}",
    "in_conv.1.{p}": "in_proj.{p}",
    "out_conv.0.{p}": "out_proj_1.{p}",
    "out_conv.2.{p}": "out_proj_2.{p}",
    "out_conv.4.{p}": "out_proj_3.{p}",
}


def _blocks(self_attention: str, cross_attention: str) -> dict[str, str]:
    """Merger and token decoder have the same blocks; only the names of their attentions differ."""
    return {
        "blocks.{n}.norm0.{p}": "layers.{n}.self_attn_layer_norm.{p}",
        "blocks.{n}.norm1.{p}": "layers.{n}.cross_attn_layer_norm.{p}",
        "blocks.{n}.norm2.{p}": "layers.{n}.mlp_layer_norm.{p}",
        f"blocks.{{n}}.{self_attention}.qkv.{{p}}": "layers.{n}.self_attn.qkv.{p}",
        f"blocks.{{n}}.{self_attention}.proj.{{p}}": "layers.{n}.self_attn.out_proj.{p}",
        f"blocks.{{n}}.{cross_attention}.query.{{p}}": "layers.{n}.cross_attn.q_proj.{p}",
        f"blocks.{{n}}.{cross_attention}.key.{{p}}": "layers.{n}.cross_attn.k_proj.{p}",
        f"blocks.{{n}}.{cross_attention}.value.{{p}}": "layers.{n}.cross_attn.v_proj.{p}",
        f"blocks.{{n}}.{cross_attention}.proj.{{p}}": "layers.{n}.cross_attn.out_proj.{p}",
        "blocks.{n}.mlp.fc1.{p}": "layers.{n}.mlp.fc1.{p}",
        "blocks.{n}.mlp.fc2.{p}": "layers.{n}.mlp.fc2.{p}",
        "norm.{p}": "norm.{p}",
    }


_MERGER = {"ln_vision.{p}": "norm_features.{p}", **_blocks("token_causal_attn", "token_cross_attn")}

_QUANTIZER = {
    "encode_task_layer.0.{p}": "proj_in.{p}",
    "encode_task_layer.2.{p}": "proj_out.{p}",
    "quantize.embedding.weight": "codebook.weight",
}

_CODEBOOK = {"quantize.embedding.weight": "codebook.weight"}

_DECODER = {
    "pos_embed": "position_embedding#batched",
    "query_embed": "query_embedding#batched",
    "in_proj.{p}": "proj_in.{p}",
    **_blocks("self_attn", "cross_attn"),
    "decode_task_layer.0.{p}": "feature_head_in.{p}",
    "decode_task_layer.2.{p}": "feature_head_out.{p}",
}

_LOWRES_HEADS = {"unet_proj.{p}": "condition_projections.0.{p}"}

_HIGHRES_HEADS = {
    "unet_proj_1.{p}": "condition_projections.0.{p}",
    "unet_proj_2.{p}": "condition_projections.1.{p}",
    "unet_attnpool.positional_embedding": "pooler.position_embedding",
    "unet_attnpool.q_proj.{p}": "pooler.q_proj.{p}",
    "unet_attnpool.k_proj.{p}": "pooler.k_proj.{p}",
    "unet_attnpool.v_proj.{p}": "pooler.v_proj.{p}",
    "unet_attnpool.c_proj.{p}": "pooler.c_proj.{p}",
}

_NEGATIVE = {"uncond_embeddings": "negative_condition#batched"}

_ALL = {"{rest}": "{rest}"}

_VISUAL = "model.visual_tokenizer."
CONTINUOUS_BRANCH = f"{_VISUAL}continuous."


@dataclass(frozen=True)
class _Section:
    """A part of a file that goes to a part of a model. Of two sections for one target the lower rank wins.

    A section that is not `at_home` may be absent: another one has these tensors too.
    """

    file: str
    prefix: str
    model: str
    target_prefix: str
    table: dict[str, str]
    rank: int = 0
    at_home: bool = True


# The original loads these files over each other with gaps allowed: the encoder's file, then stage 1 over it, and for
# understanding stage 2 over both. Hence the ranks: a tensor is taken from the last file that has it. (Both branches
# share one encoder here, so stage 2's copy of it is never taken and has to be equal.)
_SECTIONS = [
    _Section(ENCODER, "", MODEL, f"{_VISUAL}vision_model.", _VISION_ENCODER, rank=1),
    _Section(STAGE1, "encoder.", MODEL, f"{_VISUAL}vision_model.", _VISION_ENCODER, at_home=False),
    _Section(STAGE2, "encoder.", MODEL, f"{_VISUAL}vision_model.", _VISION_ENCODER, rank=2, at_home=False),
    _Section(STAGE1, "token_predictor.", MODEL, f"{_VISUAL}discrete.selector.", _SELECTOR),
    _Section(STAGE1, "causal_encoder.", MODEL, f"{_VISUAL}discrete.merger.", _MERGER),
    _Section(STAGE1, "", MODEL, f"{_VISUAL}discrete.quantizer.", _QUANTIZER),
    _Section(STAGE2, "token_predictor.", MODEL, f"{_VISUAL}continuous.selector.", _SELECTOR, at_home=False),
    _Section(STAGE2, "causal_encoder.", MODEL, f"{_VISUAL}continuous.merger.", _MERGER, at_home=False),
    _Section(STAGE1, "token_predictor.", MODEL, f"{_VISUAL}continuous.selector.", _SELECTOR, rank=1),
    _Section(STAGE1, "causal_encoder.", MODEL, f"{_VISUAL}continuous.merger.", _MERGER, rank=1),
    _Section(STAGE2, "vit_proj.", MODEL, "model.multi_modal_projector.", {"{p}": "{p}"}),
    _Section(STAGE1, "vit_proj.", MODEL, "model.multi_modal_projector.", {"{p}": "{p}"}, rank=1, at_home=False),
    _Section(LANGUAGE_MODEL, "model.", MODEL, "model.language_model.", _ALL),
    _Section(LANGUAGE_MODEL, "lm_head.", MODEL, "lm_head.", _ALL),
    _Section(LOWRES_DECODER, "", LOWRES, "", _DECODER | _LOWRES_HEADS),
    _Section(HIGHRES_DECODER, "", HIGHRES, "", _DECODER | _HIGHRES_HEADS),
    _Section(UNCONDITIONAL, "", LOWRES, "", _NEGATIVE),
    # Both decoders look their codes up in the tokenizer's codebook and carry a copy of it.
    _Section(STAGE1, "", LOWRES, "", _CODEBOOK),
    _Section(STAGE1, "", HIGHRES, "", _CODEBOOK),
]

# Known tensors that no model here uses. They are kept aside so that the original layout can be written back.
_UNUSED = {
    ENCODER: ["norm.{p}", "head.{p}"],
    STAGE1: ["encoder.norm.{p}", "encoder.head.{p}", "quantize.{rest}", "decoder.{rest}", "decode_task_layer.{rest}"],
    STAGE2: [
        "encoder.norm.{p}",
        "encoder.head.{p}",
        "quantize.{rest}",
        "encode_task_layer.{rest}",
        "decoder.{rest}",
        "decode_task_layer.{rest}",
    ],
    LANGUAGE_MODEL: ["model.rotary_emb.inv_freq", "model.layers.{n}.self_attn.rotary_emb.inv_freq"],
    LOWRES_DECODER: [],
    HIGHRES_DECODER: [],
    UNCONDITIONAL: ["{rest}"],  # where the decoder that it belongs to is absent
}

_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the original goes, and with which precedence (0 is the strongest)."""

    model: str
    target: str
    mark: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Origin:
    """A tensor of the original that may fill (a part of) a target."""

    file: str
    name: str
    mark: str = ""
    rank: int = 0
    at_home: bool = True


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", pattern)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def _translate(name: str, prefix: str, pattern: str, other_prefix: str, other: str) -> str | None:
    if not name.startswith(prefix):
        return None
    match = _regex(pattern).fullmatch(name[len(prefix) :])
    return other_prefix + other.format(**match.groupdict()) if match else None


def slots_of(file: str, name: str) -> list[Slot]:
    """Every place that tensor `name` of the original `file` may fill, the strongest claim first."""
    found = []
    for section in _SECTIONS:
        if section.file != file:
            continue
        for source, target in section.table.items():
            target, _, mark = target.partition("#")
            place = _translate(name, section.prefix, source, section.target_prefix, target)
            if place is not None:
                found.append(Slot(section.model, place, mark, section.rank))
    return sorted(found, key=lambda slot: slot.rank)


def origins_of(model: str, target: str) -> list[Origin]:
    """Every tensor of the original that may fill `target` of `model`, the strongest claim first."""
    found = []
    for section in _SECTIONS:
        if section.model != model:
            continue
        for source, place in section.table.items():
            place, _, mark = place.partition("#")
            name = _translate(target, section.target_prefix, place, section.prefix, source)
            if name is not None:
                found.append(Origin(section.file, name, mark, section.rank, section.at_home))
    return sorted(found, key=lambda origin: origin.rank)


def is_unused(file: str, name: str) -> bool:
    """Whether `name` is known to occur in `file` without being used by any model."""
    return any(_regex(pattern).fullmatch(name) for pattern in _UNUSED[file])
