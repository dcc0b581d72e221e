"""Which tensor of the original fills which tensor of the converted models, checked for gaps in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import names
from .configs import Configs, Headers
from .errors import ConversionError, listing
from .weight_files import TensorInfo

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

    Args:
        headers: The original's tensors by file and name.
        configs: The configurations of the models to fill.

    Returns:
        The mapping.

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
    first, *others = dtypes
    for other in others:
        if first is not None and other is not None:
            first = torch.promote_types(first, other)
    return first


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
