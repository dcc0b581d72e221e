"""Checks the U-Nets and VAEs of the pixel decoders against the classes that will load them."""

from __future__ import annotations

import importlib.util
import re

import torch

from ..modeling.checkpoint_files import check_counts, name_file
from .errors import ConversionError, listing
from .source import Component, OriginalCheckpoint
from .weight_files import read_json

# diffusers renames these when it loads an old checkpoint. They are stored as they are.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)")


def check_components(source: OriginalCheckpoint) -> None:
    """Names every unexpected, missing or misshapen tensor of the pixel decoders' models.

    Without diffusers, which only drawing needs, the tensors are taken as they are.
    """
    if importlib.util.find_spec("diffusers") is None:
        return
    problems = [problem for component in source.components for problem in _problems(source, component)]
    if problems:
        raise ConversionError(listing("The tensors do not fit the pixel decoders:", problems))


def _problems(source: OriginalCheckpoint, component: Component) -> list[str]:
    if component.weights is None or component.stem != "diffusion_pytorch_model":
        return []
    path = source.root / component.folder / "config.json"
    if not path.is_file():
        return [f"{component.folder}: missing config.json"]
    config = read_json(path)
    try:
        check_counts(config, len(component.weights.headers), path)
    except ValueError as error:
        return [str(error)]
    expected = _expected_shapes(config, component.folder)
    found = {_new_name(name): (name, info.shape) for name, info in component.weights.headers.items()}
    problems = [f"{component.folder}: missing {n} {list(expected[n])}" for n in expected.keys() - found.keys()]
    for new_name, (name, shape) in found.items():
        if new_name not in expected:
            problems.append(f"{component.folder}: unexpected {name} {list(shape)}")
        elif shape != expected[new_name]:
            problems.append(f"{component.folder}: {name} has shape {list(shape)}, expected {list(expected[new_name])}")
    return sorted(problems)


def _expected_shapes(config: dict, folder: str) -> dict[str, tuple[int, ...]]:
    import diffusers  # slow to import

    model_class = getattr(diffusers, str(config.get("_class_name")), None)
    if model_class is None or not issubclass(model_class, diffusers.ModelMixin):
        raise ConversionError(f"{folder}/config.json names no model of diffusers ({config.get('_class_name')}).")
    try:
        with name_file(f"{folder}/config.json"), torch.device("meta"):
            model = model_class.from_config(config)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConversionError(
            f"{folder}/config.json does not describe a network of the class {model_class.__name__}: {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _new_name(name: str) -> str:
    match = _OLD_NAME.fullmatch(name)
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name
