"""Loading one sub-model out of a whole checkpoint, without touching the shards of the rest.

transformers would load a sub-model through `base_model_prefix`, but needs every shard of the index for it and leaves
what it cannot find at random, with only a report.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .checkpoint_files import (
    _HUB_KWARGS,
    check_config,
    find_safetensors,
    hub_options,
    load_config,
    name_corrupt_weights,
    read_shapes,
    with_variant,
)
from .file_errors import file_in


def load_checkpoint_part(
    model_class: type[PreTrainedModel],
    loader: Callable[..., Any],
    checkpoint: str | os.PathLike,
    *model_args: Any,
    **kwargs: Any,
) -> Any:
    """Loads `model_class` from its own checkpoint or from that of a model that contains it.

    Args:
        model_class: Its `base_model_prefix` names the part inside the whole.
        loader: The `from_pretrained` to finish with.
        checkpoint: Directory or Hub id.
        model_args: Passed on to the model.
        kwargs: Those of [`PreTrainedModel.from_pretrained`].

    Returns:
        What `loader` returns.

    Raises:
        OSError: If weights are missing or unreadable.
        ValueError: If the checkpoint lacks a tensor of the part, or the configuration does not fit its weights.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError(f"{model_class.__name__} is loaded from safetensors only, not with use_safetensors=False.")
    variant, wants_info = kwargs.pop("variant", None), kwargs.pop("output_loading_info", False)
    hub_kwargs = hub_options(kwargs)
    config = load_config(model_class, checkpoint, hub_kwargs, kwargs)
    for name in _HUB_KWARGS:
        kwargs.pop(name, None)
    shards, prefix = _find_part(checkpoint, model_class.base_model_prefix, variant, hub_kwargs)
    shapes = {
        name[len(prefix) :]: shape
        for name, shape in read_shapes(checkpoint, shards, hub_kwargs).items()
        if name.startswith(prefix)
    }
    ignore = bool(kwargs.get("ignore_mismatched_sizes"))
    check_config(model_class, config, shapes, file_in(checkpoint, "config.json"), *model_args, ignore=ignore)
    state_dict: dict[str, torch.Tensor] = {}
    for shard in shards:
        state_dict.update(_read_tensors(cached_file(checkpoint, shard, **hub_kwargs), prefix))
    model, info = loader(None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks these tensors of {model_class.__name__}: {', '.join(sorted(info['missing_keys']))}."
        )
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return (model, info) if wants_info else model


def _find_part(
    checkpoint: str | os.PathLike, part: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, list[str]], str]:
    """The files that hold tensors of the part, with those that the index lists, and what their names start with."""
    shards = find_safetensors(checkpoint, variant, hub_kwargs)
    if not shards:  # its error says what is missing
        cached_file(checkpoint, with_variant(SAFE_WEIGHTS_NAME, variant), **hub_kwargs)
    names = [name for listed in shards.values() for name in listed] or read_shapes(checkpoint, shards, hub_kwargs)
    prefix = _prefix_in(names, part)
    parts = {shard: [name for name in listed if name.startswith(prefix)] for shard, listed in shards.items()}
    return {shard: parts[shard] for shard, listed in shards.items() if parts[shard] or not listed}, prefix


def _read_tensors(path: str, prefix: str) -> dict[str, torch.Tensor]:
    with name_corrupt_weights(path), safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no dictionary
        return {name[len(prefix) :]: file.get_tensor(name) for name in names}


def _prefix_in(names: Any, part: str) -> str:
    """Prefix of the part's tensors in a whole model, in its base model, or in a checkpoint of the part alone."""
    for candidate in (f"model.{part}.", f"{part}."):
        if any(name.startswith(candidate) for name in names):
            return candidate
    return ""
