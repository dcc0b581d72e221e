"""Checks of a pixel decoder's files against each other and against the LaVIT that they belong to."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..modeling.checkpoint_files import check_counts, differing_shapes, name_file, state_shapes
from ..utils.json_files import read_json_object
from ..utils.safetensors_files import read_headers

_INDEX_FILE = "model_index.json"
_CONFIG_FILES = {
    "token_decoder": "config.json",
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    "safety_checker": "config.json",
    "feature_extractor": "preprocessor_config.json",
}
_OF_DIFFUSERS = ("scheduler", "unet", "vae")
_ID_NAMES = ("visual_token_offset", "eoi_token_id")


def check_index(folder: Path, given: Collection[str] = ()) -> None:
    """Checks what a directory says of its pixel decoder, before anything is loaded from it.

    Args:
        folder: Directory with a `model_index.json`.
        given: Names of components and ids that are not taken from there.

    Raises:
        OSError: If a file is no JSON object, or a file of weights is corrupt.
        ValueError: If values are impossible, or do not fit together.
    """
    file = folder / _INDEX_FILE
    index = read_json_object(file)
    for part in _CONFIG_FILES.keys() - set(given):
        entry = index.get(part, [None, None])
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str | None) for e in entry):
            raise ValueError(f"{file}: {part} must name a library and a class, got {entry!r}.")
        if entry == [None, None] and part not in ("safety_checker", "feature_extractor"):
            raise ValueError(f"{file} names no {part}, which a pixel decoder needs.")
        if part in _OF_DIFFUSERS and not _is_known(entry[0], folder / part):
            raise ValueError(f"{file}: {part} is of the library {entry[0]!r}; expected 'diffusers'.")
        if entry[0] == "diffusers" and not isinstance(getattr(diffusers, entry[1] or "", None), type):
            raise ValueError(f"{file}: {part} is of the class {entry[1]!r}, which diffusers does not have.")
        if entry[0] is not None:
            _check_part(folder / part, _CONFIG_FILES[part])
    ids = {name: index[name] for name in _ID_NAMES if index.get(name) is not None and name not in given}
    for name, value in ids.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{file}: {name} must be an id, got {value!r}.")
    if len(ids) == 2 and ids["visual_token_offset"] != ids["eoi_token_id"] + 1:
        raise ValueError(
            f"{file}: visual_token_offset ({ids['visual_token_offset']}), the id of code 0, must follow eoi_token_id "
            f"({ids['eoi_token_id']}), that of the image end."
        )
    for root in (folder, folder.parent) if folder.name == "lowres" else (folder,):
        _check_whole(root / "config.json", file, ids, None if "token_decoder" in given else folder / "token_decoder")


def _is_known(library: str, folder: Path) -> bool:
    """Whether diffusers loads from it: a file of code beside the component, or what was imported already."""
    return library == "diffusers" or (folder / f"{library}.py").is_file() or library.partition(".")[0] in sys.modules


def _check_part(folder: Path, name: str) -> None:
    """Checks the configuration of a component, and that it asks for no more layers than there are tensors."""
    file = folder / name
    if not file.is_file():  # its loader says so, or looks elsewhere
        return
    values = read_json_object(file)
    count = sum(len(read_headers(weights)) for weights in sorted(folder.glob("*.safetensors")))
    if count:
        check_counts(values, count, file)


def _check_whole(config_file: Path, index_file: Path, ids: dict[str, int], token_decoder: Path | None) -> None:
    """Compares a pixel decoder with the configuration of the language model, if one stands beside it."""
    if not config_file.is_file():
        return
    config = read_json_object(config_file)
    if config.get("model_type") != "lavit":
        return
    for name, value in ids.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{name} is {value} in {index_file}, but {config[name]} in {config_file}. Of a language model and a "
                "pixel decoder that know the same codes, `lavit assemble` makes one checkpoint."
            )
    visual = config.get("visual_tokenizer_config")
    if token_decoder is None or not isinstance(visual, dict) or not (token_decoder / "config.json").is_file():
        return
    decoder = read_json_object(token_decoder / "config.json")
    for name in ("codebook_size", "codebook_dim"):
        if decoder.get(name, visual.get(name)) != visual.get(name, decoder.get(name)):
            raise ValueError(
                f"{name} is {decoder[name]} in {token_decoder / 'config.json'}, but {visual[name]} in {config_file}: "
                "their codes mean different things."
            )


@contextmanager
def name_broken_part(folder: Path) -> Iterator[None]:
    """Finds out which file is to blame when the pipeline of a directory cannot be loaded.

    Raises:
        ValueError: If a component cannot be made of what its configuration says.
    """
    try:
        yield
    except Exception as error:
        if str(folder) not in str(error):
            for part in _OF_DIFFUSERS:
                _try_part(folder, part)
        raise


def _try_part(folder: Path, part: str) -> None:
    file = folder / part / _CONFIG_FILES[part]
    if not file.is_file():
        return
    entry = read_json_object(folder / _INDEX_FILE).get(part)
    if entry is None:  # nobody loads it
        return
    with name_file(file):
        try:
            with torch.device("meta") if part != "scheduler" else torch.device("cpu"):
                built = getattr(diffusers, entry[1]).from_config(read_json_object(file))
        except (RuntimeError, ImportError) as error:
            raise ValueError(str(error)) from error
    if isinstance(built, torch.nn.Module):
        _compare_shapes(built, file)


def _compare_shapes(model: torch.nn.Module, config_file: Path) -> None:
    expected = state_shapes(model)
    for weights in sorted(config_file.parent.glob("*.safetensors")):
        found = {name: header.shape for name, header in read_headers(weights).items()}
        for name in differing_shapes(found, expected):
            raise ValueError(
                f"{config_file} does not fit {weights.name}: {name} would have the shape {expected[name]}, but the "
                f"weights have {found[name]}."
            )


def check_complete(folder: Path, components: dict[str, Any]) -> None:
    """Refuses networks that diffusers has left without some of their weights, with a warning at most.

    Args:
        folder: Where they were loaded from.
        components: Networks by the names of their parts.

    Raises:
        OSError: If a tensor is in no file.
    """
    for part, network in components.items():
        empty = {name for name, tensor in network.state_dict().items() if tensor.is_meta}
        if not empty:
            continue
        files = sorted((folder / part).glob("*.safetensors"))
        for file in files:
            empty -= read_headers(file).keys()
        if empty and files:  # else it was offloaded
            raise OSError(f"{files[0]} lacks {len(empty)} tensors, the first is {min(empty)}; save it again.")


__all__ = ["check_complete", "check_index", "name_broken_part"]
