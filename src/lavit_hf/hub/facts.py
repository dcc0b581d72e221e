"""What a checkpoint is: read from its files, for the model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from .errors import PublishError
from .files import WEIGHTS

_METRICS = ("metrics.json", "evaluation/metrics.json")
_MODEL_TYPES = ("lavit", "lavit_visual_tokenizer")
_GUIDANCE = 4.0  # of checkpoints that do not say
_DECODERS = ("", "lowres/")


@dataclass
class Facts:
    """What the files of a checkpoint say.

    Attributes:
        config: Its configuration: that of a LaVIT, or of a visual tokenizer.
        parameters: Numbers of parameters by part.
        dtypes: The precisions of the weights, most frequent first.
        pixel_decoders: Which pixel decoders there are, by their directory.
        results: The results of an evaluation, as `lavit evaluate` writes them.
        guidance_scale: What it draws with.
    """

    config: Any
    parameters: dict[str, int]
    dtypes: list[str]
    pixel_decoders: dict[str, str]
    results: list[dict[str, Any]] = field(default_factory=list)
    guidance_scale: float = _GUIDANCE

    @property
    def is_whole(self) -> bool:
        """Whether this is a LaVIT, not a visual tokenizer alone."""
        return self.config.model_type == "lavit"


def read_facts(root: Path, files: list[str], config: Any) -> Facts:
    """Reads the facts of a checkpoint.

    Args:
        root: Its directory.
        files: Its files, relative to it.
        config: Its configuration.

    Raises:
        PublishError: If its metrics cannot be understood.
    """
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for file in sorted(files, key=lambda name: ("/" in name, name)):  # the model itself first
        if file.endswith(WEIGHTS) and not file.startswith("original/"):
            _count(root, file, config.model_type == "lavit", parameters, dtypes)
    decoders = {folder: _decoder_kind(root / folder) for folder in _DECODERS if f"{folder}model_index.json" in files}
    names = [name for name, _ in dtypes.most_common()]
    return Facts(config, dict(parameters), names, decoders, _read_results(root), _read_guidance(root))


def read_config(root: Path) -> Any:
    """Reads the configuration of a checkpoint.

    Raises:
        PublishError: If it is neither a LaVIT nor a visual tokenizer.
    """
    if (root / "adapter_config.json").is_file() and (root / "config.json").is_file():
        raise PublishError(f"{root} holds adapters of LoRA beside a model: keep them in a directory of their own.")
    if (root / "adapter_config.json").is_file():
        raise PublishError(
            f"{root} holds adapters of LoRA, not a whole LaVIT: merge them into their base first, or publish them "
            "with push_to_hub."
        )
    try:
        content = json.loads((root / "config.json").read_text(encoding="utf-8"))
        model_type = content["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{root} is not a LaVIT checkpoint: it has no readable config.json.") from error
    if model_type not in _MODEL_TYPES:
        raise PublishError(f"{root} is not a LaVIT checkpoint: its config.json is of a {model_type!r} model.")
    return AutoConfig.from_pretrained(root)


def _decoder_kind(folder: Path) -> str:
    """As `decoder=` of pipelines and `--decoder` tell them apart: only one of them has a pooled condition."""
    path = folder / "token_decoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return "low-resolution" if config.get("pooled_size", 0) is None else "high-resolution"


def _read_guidance(root: Path) -> float:
    path = root / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values.get("drawing_guidance_scale", _GUIDANCE)


def _count(root: Path, file: str, is_whole: bool, parameters: Counter[str], dtypes: Counter[str]) -> None:
    with safe_open(root / file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no dictionary
            tensor = weights.get_slice(name)
            size = prod(tensor.get_shape())
            parameters[_part(file, name, is_whole)] += size
            dtypes[tensor.get_dtype()] += size


def _part(file: str, name: str, is_whole: bool) -> str:
    folder, _, _ = file.rpartition("/")
    if folder:
        return folder
    return "language model" if is_whole and ".visual_tokenizer." not in f".{name}" else "visual tokenizer"


def _read_results(root: Path) -> list[dict[str, Any]]:
    for name in _METRICS:
        path = root / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, Mapping) or not isinstance(content.get("results"), list):
                raise PublishError(f"{path} is not what `lavit evaluate` writes: it has no list of results.")
            return content["results"]
    return []
