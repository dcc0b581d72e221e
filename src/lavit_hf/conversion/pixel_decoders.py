"""`model_index.json` of the pixel decoders, by which diffusers loads them."""

from __future__ import annotations

import json
from pathlib import Path

from ..modeling.configuration_lavit import LavitConfig
from ..remote_code import (
    PIPELINE_CLASS,
    PIPELINE_MODULE,
    TOKEN_DECODER_CLASS,
    TOKEN_DECODER_MODULE,
    write_code,
)
from . import names
from .weight_files import read_json

_INDEX = "model_index.json"


def save_pipelines(config: LavitConfig, folder: Path) -> None:
    """Writes what makes pipelines of the pixel decoders in a converted directory.

    A decoder that lacks one of its parts gets none. Works without diffusers.

    Args:
        config: The language model's configuration, which gives codes their ids.
        folder: The converted directory.
    """
    for token_decoder in (names.HIGHRES, names.LOWRES):
        root = (folder / token_decoder).parent
        components = _components(root)
        if components is None:
            continue
        write_code(root)
        index = {
            "_class_name": [PIPELINE_MODULE, PIPELINE_CLASS],
            **components,
            "visual_token_offset": config.visual_token_offset,
            "eoi_token_id": config.eoi_token_id,
        }
        if ignored := _foreign_weights(root, components):
            index["_ignore_files"] = ignored
        (root / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def link_pixel_decoders(folder: Path) -> None:
    """Has the pixel decoders in a directory draw what the language model beside them writes.

    Those that were trained by themselves do not know which ids codes have, and others may have known another language
    model.

    Args:
        folder: Directory of a LaVIT with `model_index.json`, in `lowres/`, too.
    """
    config = LavitConfig.from_pretrained(folder)
    for root in (folder, folder / "lowres"):
        if not (root / _INDEX).is_file():
            continue
        index = read_json(root / _INDEX)
        index |= {"visual_token_offset": config.visual_token_offset, "eoi_token_id": config.eoi_token_id}
        parts = {name: value for name, value in index.items() if isinstance(value, list) and name[0] != "_"}
        if ignored := _foreign_weights(root, parts):
            index["_ignore_files"] = ignored
        (root / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    return read_json(path).get("_class_name") if path.is_file() else None


def _foreign_weights(root: Path, components: dict[str, list[str | None]]) -> list[str]:
    """Weights of the language model and of the other decoder, which diffusers would download along otherwise."""
    files = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    return [
        file.as_posix()
        for file in files
        if file.parts[0] not in components and file.name.endswith((".safetensors", ".safetensors.index.json"))
    ]
