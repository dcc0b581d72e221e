"""Which tensor of the original fills which tensor of the converted models, checked for gaps in both directions."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import names
from .configs import Configs, Headers, infer_configs
from .weight_files import ConversionError, TensorInfo, listing, read_json

# The order in which the parts of a target are put together.
_MARKS = ("", "batched", "query", "value")


@dataclass(frozen=True)
class Target:
    """A tensor of a converted model and the one or more tensors of the original that it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    origins: tuple[names.Origin, ...]


@dataclass
class CheckpointMapping:
    """Everything that is known before a single tensor is read.

    Attributes:
        models: For every model, by its folder, the targets in the order they are written.
        unused: Tensors that no model uses, as (file, name).
        overridden: Tensors of the original that a stronger one replaces, as (file, name) to (file, name).
    """

    models: dict[str, dict[str, Target]] = field(default_factory=dict)
    unused: list[tuple[str, str]] = field(default_factory=list)
    overridden: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


def map_checkpoint(headers: Headers, configs: Configs) -> CheckpointMapping:
    """Maps every tensor of the original to its place.

    Raises:
        ConversionError: A tensor has no place, a place has no tensor, or a shape is wrong; all of them are named.
    """
    expected = model_shapes(configs)
    mapping = CheckpointMapping()
    problems: list[str] = []
    for model, shapes in expected.items():
        mapping.models[model] = {}
        for name, shape in shapes.items():
            origins = _choose(headers, model, name)
            if not origins:
                problems += _missing(headers, model, name, shape)
            else:
                dtype = _common_dtype(headers, origins)
                mapping.models[model][name] = Target(shape, dtype, origins)
    for file, tensors in headers.items():
        for name, info in tensors.items():
            problems += _place(mapping, expected, file, name, info, configs)
    if problems:
        raise ConversionError(listing("The tensors do not fit the models:", dict.fromkeys(problems)))
    return mapping


def model_shapes(configs: Configs) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the models' tensors, from models without memory; the visual part first."""
    # Imported here: these bring in the model code of Llama and BLIP-2.
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..modeling.modeling_lavit_token_decoder import LavitTokenDecoder

    with torch.device("meta"):
        model = LavitForConditionalGeneration(configs.model)
        decoders = {folder: LavitTokenDecoder(config) for folder, config in configs.token_decoders.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if configs.model.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    visual_first = sorted(shapes, key=lambda name: not name.startswith("model.visual_tokenizer."))
    expected = {names.MODEL: {name: shapes[name] for name in visual_first}}
    for folder, decoder in decoders.items():
        expected[folder] = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    return expected


def original_shape(shape: tuple[int, ...], mark: str) -> tuple[int, ...]:
    """The shape a tensor has in the original, from its target's."""
    if mark == "batched":
        return (1, *shape)
    if mark in ("query", "value"):
        return (shape[0] // 3, *shape[1:])
    return shape


def _candidates(model: str, target: str) -> dict[str, list[names.Origin]]:
    """The tensors that may fill every part of a target, the strongest first."""
    parts: dict[str, list[names.Origin]] = {}
    for origin in names.origins_of(model, target):
        parts.setdefault(origin.mark, []).append(origin)
    return dict(sorted(parts.items(), key=lambda item: _MARKS.index(item[0])))


def _choose(headers: Headers, model: str, target: str) -> tuple[names.Origin, ...]:
    """The strongest present tensor for every part of the target; none if a part is missing."""
    chosen = []
    for candidates in _candidates(model, target).values():
        present = [candidate for candidate in candidates if candidate.name in headers.get(candidate.file, {})]
        if not present:
            return ()
        chosen.append(present[0])
    return tuple(chosen)


def _common_dtype(headers: Headers, origins: tuple[names.Origin, ...]) -> torch.dtype | None:
    dtypes = [headers[origin.file][origin.name].dtype for origin in origins]
    known = [dtype for dtype in dtypes if dtype is not None]
    return functools.reduce(torch.promote_types, known) if known else None


def _place(
    mapping: CheckpointMapping,
    expected: Mapping[str, Mapping[str, tuple[int, ...]]],
    file: str,
    name: str,
    info: TensorInfo,
    configs: Configs,
) -> list[str]:
    """Files a tensor of the original under its targets, as overridden or as unused; returns what is wrong with it."""
    slots = [slot for slot in names.slots_of(file, name) if slot.target in expected.get(slot.model, {})]
    if not slots:
        tied = name == "lm_head.weight" and configs.model.tie_word_embeddings
        if tied or names.is_unused(file, name):
            mapping.unused.append((file, name))
            return []
        return [f"{file}: unexpected {name} {list(info.shape)}"]
    problems, winner = [], None
    for slot in slots:
        shape = original_shape(expected[slot.model][slot.target], slot.mark)
        if info.shape != shape:
            problems.append(f"{file}: {name} has shape {list(info.shape)}, expected {list(shape)} for {slot.target}")
        target = mapping.models[slot.model].get(slot.target)
        taken = next((o for o in target.origins if o.mark == slot.mark), None) if target else None
        if taken and (taken.file, taken.name) == (file, name):
            return problems
        winner = winner or taken
    if winner:
        mapping.overridden[file, name] = (winner.file, winner.name)
    return problems


def _missing(headers: Headers, model: str, target: str, shape: tuple[int, ...]) -> list[str]:
    """Names the absent tensors of a target in the files where they belong."""
    parts = _candidates(model, target)
    if not parts:
        return [f"{target} {list(shape)} of the model has no counterpart in the original layout"]
    absent = [
        next(candidate for candidate in candidates if candidate.at_home)
        for candidates in parts.values()
        if not any(candidate.name in headers.get(candidate.file, {}) for candidate in candidates)
    ]
    return [f"{o.file}: missing {o.name} {list(original_shape(shape, o.mark))}" for o in absent]


# What happens to single tensors on their way to a model and back.


def join(parts: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Makes a target out of the original's tensors, given with their marks (see `names`) in the order of the marks.

    Returns:
        The target: one tensor as it is or without its leading 1, or the packed bias `[query; 0; value]`.
    """
    (mark, first), *others = parts
    if mark == "query":
        value = others[0][1]
        dtype = torch.promote_types(first.dtype, value.dtype)
        return torch.cat([first.to(dtype), torch.zeros_like(first, dtype=dtype), value.to(dtype)])
    return first.squeeze(0) if mark == "batched" else first


def split(target: torch.Tensor, mark: str) -> torch.Tensor:
    """Makes the original's tensor out of a target; the opposite of `join`.

    The bias of the keys, if training gave it values, is dropped: the softmax over the keys does not see it.
    """
    if mark == "batched":
        return target.unsqueeze(0)
    if mark in ("query", "value"):
        return target.chunk(3)[0 if mark == "query" else 2].clone()
    return target


# The same at full size, from a list of names and shapes, without weights.


_LLAMA_HEAD_WIDTH = 128  # of Llama and Llama 2; a list of shapes does not tell it


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the original and where it goes; `model` is `None` if no model uses it."""

    file: str
    name: str
    shape: tuple[int, ...]
    model: str | None
    target: str


@dataclass
class Plan:
    """The complete mapping of a checkpoint. Printing it gives a summary per file and per model.

    Attributes:
        tensors: Every tensor of the original, once per place it goes to.
        models: Number of tensors and of parameters of every model, by its folder.
    """

    tensors: list[PlannedTensor]
    models: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        lines = ["From the original:"]
        for file in dict.fromkeys(tensor.file for tensor in self.tensors):
            rows = {tensor.name: tensor for tensor in self.tensors if tensor.file == file}
            unused = sum(tensor.model is None for tensor in rows.values())
            parameters = sum(math.prod(tensor.shape) for tensor in rows.values())
            aside = f", {unused} kept aside" if unused else ""
            lines.append(f"  {file:<44}{len(rows):>5} tensors {parameters:>14,} parameters{aside}")
        lines.append("To:")
        for model, (count, parameters) in self.models.items():
            lines.append(f"  {model or '.':<44}{count:>5} tensors {parameters:>14,} parameters")
        return "\n".join([*lines, "Every tensor has its place, and every place its tensor."])


def plan(manifest: str | os.PathLike[str], heads: Mapping[str, int] | str | None = None) -> Plan:
    """Maps every tensor of a manifest to its place in the models, which are built without memory.

    Args:
        manifest: JSON file with `{"files": {FILE: {"tensors": {NAME: SHAPE}}}}`.
        heads: As for `convert`.

    Returns:
        The plan.

    Raises:
        ConversionError: A tensor has no place, a place has no tensor, or a shape is wrong; all of them are named.
    """
    headers = _read_manifest(Path(manifest))
    if missing := [f for f in (names.ENCODER, names.STAGE1, names.STAGE2, names.LANGUAGE_MODEL) if f not in headers]:
        raise ConversionError(listing(f"{manifest} does not list:", missing))
    configs = infer_configs(headers, _llama_config(headers[names.LANGUAGE_MODEL]), heads)
    return _summarize(headers, map_checkpoint(headers, configs))


def _summarize(headers: Headers, mapping: CheckpointMapping) -> Plan:
    tensors = []
    for file, infos in headers.items():
        for name, info in infos.items():
            slots = [s for s in names.slots_of(file, name) if s.target in mapping.models.get(s.model, {})]
            if (file, name) in mapping.overridden or not slots:
                tensors.append(PlannedTensor(file, name, info.shape, None, ""))
            for slot in slots if (file, name) not in mapping.overridden else []:
                origins = mapping.models[slot.model][slot.target].origins
                if any((origin.file, origin.name) == (file, name) for origin in origins):
                    tensors.append(PlannedTensor(file, name, info.shape, slot.model, slot.target))
    models = {
        model: (len(targets), sum(torch.Size(target.shape).numel() for target in targets.values()))
        for model, targets in mapping.models.items()
    }
    return Plan(tensors, models)


def _read_manifest(path: Path) -> dict[str, dict[str, TensorInfo]]:
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise ConversionError(f"{path} has no object named files.")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file, entry in files.items():
        try:
            shapes = {name: tuple(int(size) for size in shape) for name, shape in entry["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConversionError(f"{path}: the entry of {file} is no list of shapes.") from error
        headers.setdefault(_file_of(path, file), {}).update({n: TensorInfo(shape) for n, shape in shapes.items()})
    return headers


def _file_of(path: Path, listed: str) -> str:
    """The file that a manifest calls, for example, `language_model/pytorch_model*.bin | model*.safetensors`."""
    if listed.startswith(("language_model/pytorch_model", "language_model/model")):
        return names.LANGUAGE_MODEL
    file = listed.removesuffix(".bin").removesuffix(".safetensors")
    decoders = (names.LOWRES_DECODER, names.HIGHRES_DECODER, names.UNCONDITIONAL)
    known = (names.ENCODER, names.STAGE1, names.STAGE2, *decoders)
    if file not in known:
        raise ConversionError(f"{path} lists {listed}, which is no file of weights of the original layout.")
    return file


def _llama_config(tensors: Mapping[str, TensorInfo]) -> dict:
    """A Llama configuration of these shapes."""
    layers = [name for name in tensors if name.endswith(".self_attn.q_proj.weight")]
    needed = (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    )
    if missing := [name for name in needed if name not in tensors]:
        raise ConversionError(listing(f"{names.LANGUAGE_MODEL}: missing", missing))
    vocab_size, hidden_size = tensors[needed[0]].shape
    keys = tensors[needed[2]].shape[0]
    head_width = math.gcd(_LLAMA_HEAD_WIDTH, hidden_size, keys)
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": tensors[needed[1]].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden_size // head_width,
        "num_key_value_heads": keys // head_width,
    }
