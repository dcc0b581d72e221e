"""Checks the mapping of names at full size, from a list of names and shapes, without weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import names
from .configs import Configs, Headers, infer_configs
from .errors import ConversionError, listing
from .mapping import CheckpointMapping, map_checkpoint
from .weight_files import TensorInfo, read_json

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
    return _summarize(headers, map_checkpoint(headers, configs), configs)


def _summarize(headers: Headers, mapping: CheckpointMapping, configs: Configs) -> Plan:
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
