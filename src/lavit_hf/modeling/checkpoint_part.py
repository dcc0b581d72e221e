"""Loading one sub-model out of a whole checkpoint, without touching the shards of the rest.

transformers would load a sub-model through `base_model_prefix`, but needs every shard of the index for it and leaves
what it cannot find at random, with only a report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

_HUB_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


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
        ValueError: If the checkpoint lacks a tensor of the part.
    """
    hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
    config = _load_part_config(model_class, checkpoint, hub_kwargs, kwargs)
    state_dict = _read_part(checkpoint, model_class.base_model_prefix, kwargs.pop("variant", None), hub_kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    for name in _HUB_KWARGS:
        kwargs.pop(name, None)
    model, info = loader(None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks these tensors of {model_class.__name__}: {', '.join(sorted(info['missing_keys']))}."
        )
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return (model, info) if wants_info else model


def _load_part_config(
    model_class: type[PreTrainedModel],
    checkpoint: str | os.PathLike,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedConfig:
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config
    config_class = model_class.config_class
    assert config_class is not None
    # As in transformers, keyword arguments that name a configuration value override it.
    known = config_class.__dataclass_fields__.keys() - {"dtype"}
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    return config_class.from_pretrained(config or checkpoint, **hub_kwargs, **overrides)


def _read_part(
    checkpoint: str | os.PathLike, prefix: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    index_file = cached_file(
        checkpoint,
        _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant),
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    if index_file is None:
        files = [_with_variant(SAFE_WEIGHTS_NAME, variant)]
    else:
        with open(index_file, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        inside = _prefix_in(weight_map, prefix)
        files = sorted({shard for name, shard in weight_map.items() if name.startswith(inside)})
        if elsewhere := [name for name in files if Path(name).name != name]:
            raise OSError(f"{index_file} names {elsewhere[0]}, but files of weights are beside it.")
    state_dict: dict[str, torch.Tensor] = {}
    for name in files:
        state_dict.update(_read_tensors(cached_file(checkpoint, name, **hub_kwargs), prefix))
    return state_dict


def _read_tensors(path: str, prefix: str) -> dict[str, torch.Tensor]:
    with name_corrupt_weights(path), safe_open(path, framework="pt") as file:
        inside = _prefix_in(file.keys(), prefix)
        names = [name for name in file.keys() if name.startswith(inside)]  # noqa: SIM118 - no dictionary
        return {name[len(inside) :]: file.get_tensor(name) for name in names}


@contextmanager
def name_corrupt_weights(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Turns the bare message of safetensors about an unreadable file into one that says which and what to do.

    Args:
        checkpoint: A file of weights, a directory that holds some, or a Hub id.

    Raises:
        OSError: If the body raises a `SafetensorError`.
    """
    try:
        yield
    except SafetensorError as error:
        folder = Path(checkpoint or "")
        broken = [str(file) for file in sorted(folder.glob("*.safetensors")) if not _is_readable(file)]
        raise OSError(
            f"{', '.join(broken) or checkpoint} is not a readable safetensors file ({error}). Download or convert it "
            "again."
        ) from error


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _prefix_in(names: Any, prefix: str) -> str:
    """Prefix of the part's tensors in a whole model, in its base model, or in a checkpoint of the part alone."""
    for candidate in (f"model.{prefix}.", f"{prefix}."):
        if any(name.startswith(candidate) for name in names):
            return candidate
    return ""


def _with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, as transformers names variants."""
    stem, extension = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{extension}"
