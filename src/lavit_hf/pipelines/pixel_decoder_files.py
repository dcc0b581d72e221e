"""The files of pixel decoders: `model_index.json`, and how a fine-tuned checkpoint takes over those of its base."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..modeling.configuration_lavit import LavitConfig
from ..remote_code import (
    TEXT_TO_IMAGE_CLASS,
    TEXT_TO_IMAGE_MODULE,
    TOKEN_DECODER_CLASS,
    TOKEN_DECODER_MODULE,
    names_our_pipeline,
    pipeline_of,
    write_code,
)
from ..utils.atomic_files import write_json
from ..utils.json_files import read_json_object
from ..utils.paths import resolve_inside

MODEL_INDEX = "model_index.json"
# Where they are in a LaVIT directory: the high-resolution one at the root.
DECODER_FOLDERS = ("", "lowres/")

_NAME = re.compile(r"[A-Za-z_]\w*")  # of a folder or a file of code: nothing outside the directory


def copy_pixel_decoders(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> list[str]:
    """Copies the pixel decoders of a checkpoint: with the same codes, another one draws by them, too.

    Args:
        source: A LaVIT directory, or the id of a repository.
        destination: A directory, such as that of a fine-tuned model. A pixel decoder that it has stays.

    Returns:
        The files, relative to either directory; none if there is nothing to copy.

    Raises:
        OSError: If a part of a pixel decoder is missing.
        ValueError: If a part is not in the directory.
    """
    source, target = os.fspath(source), Path(destination)
    root = _fetch(source, [f"{folder}{MODEL_INDEX}" for folder in DECODER_FOLDERS])
    folders = [
        folder
        for folder in DECODER_FOLDERS
        if (root / folder / MODEL_INDEX).is_file() and not (target / folder / MODEL_INDEX).exists()
    ]
    if not folders:
        return []
    patterns = [pattern for folder in folders for pattern in _patterns(root, folder)]
    root = _fetch(source, patterns)
    files: list[Path] = []
    for pattern in patterns:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
        if not found:
            raise OSError(f"{source} has a pixel decoder ({MODEL_INDEX}), but no {pattern}.")
        files += found
    names = [path.relative_to(root).as_posix() for path in files]
    for name in names:  # all of them, before anything is written
        resolve_inside(root, name, source)
    written: dict[str, None] = {}  # in this order
    for path, name in zip(files, names, strict=True):
        folder = (target / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        if path.name == MODEL_INDEX and names_our_pipeline(path.parent):
            code = write_code(folder)  # that of this version, and where the source has none
            written |= dict.fromkeys(file.relative_to(target).as_posix() for file in code)
            index = {**read_json_object(path), "_class_name": pipeline_of(folder)}
            write_json(folder / MODEL_INDEX, _with_language_model(index), sort_keys=True)
        else:
            shutil.copyfile(path, target / name)
        written[name] = None
    return list(written)


def _fetch(source: str, patterns: list[str]) -> Path:
    return Path(source if os.path.isdir(source) else snapshot_download(source, allow_patterns=patterns))


def _patterns(root: Path, folder: str) -> list[str]:
    """Files of a pixel decoder; the one that says it is there comes last."""
    parts, modules = read_parts(root / folder / MODEL_INDEX)
    beside = [] if names_our_pipeline(root / folder) else [module for module in modules if "/" not in module]
    code = [f"{folder}{module}.py" for module in beside]
    return [*code, *(f"{folder}{part}/*" for part in parts), f"{folder}{MODEL_INDEX}"]


def read_parts(index: Path, error: type[Exception] = ValueError) -> tuple[list[str], list[str]]:
    """The parts of a pipeline, and the modules of code that its directory has to hold, relative to it.

    Raises:
        Exception: `error`, if a `model_index.json` cannot be understood, or names files elsewhere.
    """
    content = read_json_object(index, error)
    parts, modules = [], []
    for name, value in {"": content.get("_class_name"), **content}.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise error(f"{index}: {name or '_class_name'!r} is not a library and a class, but {value!r:.100}.")
        module = value[0]
        if not _NAME.fullmatch(name or str(module)):
            raise error(f"{index} names {name or module!r}, which cannot be a part of a pipeline.")
        if name and module is not None:  # a part that a pipeline does without is two times `None`
            parts.append(name)
        if module is not None and _NAME.fullmatch(module):
            modules.append(f"{name}/{module}".lstrip("/"))
    return parts, modules


def save_pipelines(config: LavitConfig, folder: Path) -> None:
    """Writes what makes pipelines of the pixel decoders in a converted directory; works without diffusers.

    A decoder that lacks one of its parts gets none.
    """
    for decoder in DECODER_FOLDERS:
        root = folder / decoder
        if (components := _components(root)) is None:
            continue
        write_code(root)
        _write_index(root, {"_class_name": pipeline_of(root), **components}, config)


def link_pixel_decoders(folder: Path) -> None:
    """Has the pixel decoders in a directory draw what the language model beside them writes.

    Those that were trained by themselves do not know which ids codes have, and others may have known another language
    model.

    Args:
        folder: Directory of a LaVIT with `model_index.json`, in `lowres/`, too.
    """
    config = LavitConfig.from_pretrained(folder)
    for root in (folder / decoder for decoder in DECODER_FOLDERS):
        if not (root / MODEL_INDEX).is_file():
            continue
        index = read_json_object(root / MODEL_INDEX)
        if names_our_pipeline(root):
            index["_class_name"] = pipeline_of(root)
            write_code(root)
        _write_index(root, index, config)


def _write_index(root: Path, index: dict[str, Any], config: LavitConfig) -> None:
    """Writes `model_index.json` with the ids that codes have in a language model.

    diffusers is told to leave out weights that the pipeline does not need, such as those of the other decoder, which
    it would download otherwise.
    """
    index |= {"visual_token_offset": config.visual_token_offset, "eoi_token_id": config.eoi_token_id}
    parts = {name for name, value in index.items() if isinstance(value, list) and name[0] != "_"}
    files = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    weights = [file for file in files if file.name.endswith((".safetensors", ".safetensors.index.json"))]
    if ignored := [file.as_posix() for file in weights if file.parts[0] not in parts]:
        index["_ignore_files"] = ignored
    write_json(root / MODEL_INDEX, _with_language_model(index), sort_keys=True)


def _with_language_model(index: dict[str, Any]) -> dict[str, Any]:
    """The index; for the pipeline of prompts, weights at the root, the language model's, are downloaded, too."""
    if index.get("_class_name") != [TEXT_TO_IMAGE_MODULE, TEXT_TO_IMAGE_CLASS]:
        return index
    ignored = [file for file in index.get("_ignore_files", []) if "/" in str(file)]
    rest = {name: value for name, value in index.items() if name != "_ignore_files"}
    return {**rest, "_ignore_files": ignored} if ignored else rest


def _components(root: Path) -> dict[str, list[str | None]] | None:
    """Library and class of every component, or `None` if one is missing."""
    classes = {
        "unet": _class_name(root / "unet/config.json"),
        "vae": _class_name(root / "vae/config.json"),
        "scheduler": _class_name(root / "scheduler/scheduler_config.json"),
    }
    if None in classes.values() or not (root / "token_decoder/config.json").is_file():
        return None
    has_checker = (root / "safety_checker/model.safetensors").is_file() and (
        root / "feature_extractor/preprocessor_config.json"
    ).is_file()
    return {
        "token_decoder": [TOKEN_DECODER_MODULE, TOKEN_DECODER_CLASS],
        **{name: ["diffusers", class_name] for name, class_name in classes.items()},
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if has_checker else [None, None],
        # Old files name a class that transformers no longer has; this one took its place.
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if has_checker else [None, None],
    }


def _class_name(path: Path) -> str | None:
    return read_json_object(path).get("_class_name") if path.is_file() else None
