"""Makes a saved directory one that Auto classes load where this package is not installed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle import bundle_files

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGURATION, MODELING, PROCESSING = "configuration_lavit", "modeling_lavit", "processing_lavit"
_ENTRIES = (
    "modeling/configuration_lavit.py",
    "modeling/modeling_lavit.py",
    "processing/processing_lavit.py",
    "processing/image_processing_lavit.py",
)
# These define no network, and the configuration must be there before the networks are; so must what all share.
_OF_CONFIGURATION = {"configuration_lavit.py", "file_errors.py", "saving.py"}
_SHARED = "utils"

# `auto_map` tells the Auto classes which file has which class.
_MODEL_MAPS = {
    "lavit": {
        "AutoConfig": f"{CONFIGURATION}.LavitConfig",
        "AutoModel": f"{MODELING}.LavitModel",
        "AutoModelForImageTextToText": f"{MODELING}.LavitForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{MODELING}.LavitForConditionalGeneration",
    },
    "lavit_visual_tokenizer": {
        "AutoConfig": f"{CONFIGURATION}.LavitVisualTokenizerConfig",
        "AutoModel": f"{MODELING}.LavitVisualTokenizer",
    },
}
_PROCESSOR_CLASS, _TOKENIZER_CLASS = "ImageTextProcessor", "LavitTokenizer"
_IMAGE_PROCESSOR_CLASSES = ("LavitImageProcessorPil", "LavitImageProcessor")  # that of PIL, that of torchvision
_PROCESSOR_MAP = {"AutoProcessor": f"{PROCESSING}.{_PROCESSOR_CLASS}"}
_TOKENIZER_MAP = {"AutoTokenizer": [None, f"{PROCESSING}.{_TOKENIZER_CLASS}"]}  # one without `tokenizers`, one with
_IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": [f"{PROCESSING}.{name}" for name in _IMAGE_PROCESSOR_CLASSES]}


def save_remote_code(folder: Path) -> None:
    """Writes the code files into a directory, and names their classes in the configurations that are in it.

    Does nothing where there is nothing of LaVIT's.

    Args:
        folder: What a model, a processor or a part of either was saved to.
    """
    changes = {
        "config.json": _name_model,
        "processor_config.json": _name_processor,
        "preprocessor_config.json": _name_image_processor,
        "tokenizer_config.json": _name_tokenizer,
    }
    changed = [name for name, change in changes.items() if _change_json(folder / name, change)]
    if changed:
        for name, code in code_files().items():
            (folder / name).write_text(code, encoding="utf-8")


@functools.cache
def code_files() -> dict[str, str]:
    """The files of code, by name."""
    files = bundle_files([_PACKAGE / entry for entry in _ENTRIES], _file_of)
    return {f"{name}.py": code for name, code in files.items()}


def _file_of(path: Path) -> str:
    if path.name in _OF_CONFIGURATION or path.parent.name == _SHARED:
        return CONFIGURATION
    return MODELING if path.parent.name == "modeling" else PROCESSING


def _change_json(path: Path, change: Callable[[dict[str, Any]], bool]) -> bool:
    """Changes a file if it is there and is LaVIT's, which `change` tells."""
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    if is_ours := change(config):
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return is_ours


def _name_model(config: dict[str, Any]) -> bool:
    return _add_map(config, _MODEL_MAPS.get(config.get("model_type", "")))


def _name_processor(config: dict[str, Any]) -> bool:
    _name_image_processor(config.get("image_processor") or {})
    return config.get("processor_class") == _PROCESSOR_CLASS and _add_map(config, _PROCESSOR_MAP)


def _name_image_processor(config: dict[str, Any]) -> bool:
    is_ours = config.get("image_processor_type") in _IMAGE_PROCESSOR_CLASSES
    return is_ours and _add_map(config, _IMAGE_PROCESSOR_MAP)


def _name_tokenizer(config: dict[str, Any]) -> bool:
    return config.get("tokenizer_class") == _TOKENIZER_CLASS and _add_map(config, _TOKENIZER_MAP)


def _add_map(config: dict[str, Any], auto_map: dict[str, Any] | None) -> bool:
    if auto_map is not None:
        config["auto_map"] = auto_map
    return auto_map is not None
