"""What a checkpoint is: read from its files, for the model card."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..data.worlds import WORLDS, World, find_world
from ..modeling.checkpoint_files import find_file
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX
from ..training.language_model.adapters import read_adapter_config
from ..utils.json_files import read_json_object
from ..utils.safetensors_files import read_headers
from .files import METRICS, WEIGHTS, PublishError, read_object

_MODEL_TYPES = ("lavit", "lavit_visual_tokenizer")
_GENERATION, _GUIDANCE_NAME = "generation_config.json", "drawing_guidance_scale"
_GUIDANCE = 4.0  # of checkpoints that do not say


@dataclass
class AdapterFacts:
    """What training changed of a model that is published elsewhere, as PEFT saves it.

    Attributes:
        base: The model, as the adapter names it: a name on the Hub or a path.
        rows: What its configuration says, by what that is called.
    """

    base: str | None
    rows: dict[str, str] = field(default_factory=dict)


@dataclass
class Facts:
    """What the files of a checkpoint say.

    Attributes:
        config: Its configuration: that of a LaVIT, or of a visual tokenizer; `None` of an adapter.
        parameters: Numbers of parameters by part.
        dtypes: The precisions of the weights, most frequent first.
        pixel_decoders: Which pixel decoders there are, by their directory.
        results: The results of an evaluation, as `lavit evaluate` writes them.
        guidance_scale: What it draws with.
        adapter: What is adapted, of an adapter.
        has_processor: Whether the processor is there.
    """

    config: Any
    parameters: dict[str, int]
    dtypes: list[str]
    pixel_decoders: dict[str, str]
    results: list[dict[str, Any]] = field(default_factory=list)
    guidance_scale: float = _GUIDANCE
    adapter: AdapterFacts | None = None
    has_processor: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether this is a LaVIT, not a visual tokenizer or an adapter alone."""
        return self.config is not None and self.config.model_type == "lavit"


def read_checkpoint(root: Path, files: list[str], config: Any, adapter: AdapterFacts | None = None) -> Facts:
    """Reads the facts of a checkpoint: a model with a configuration, or an adapter."""
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    whole = "adapter" if adapter else "language model" if config.model_type == "lavit" else "visual tokenizer"
    counted: set[tuple[str, str]] = set()
    for file in sorted(files, key=lambda name: ("/" in name, name.count("."), name)):  # the model itself first
        if file.endswith(WEIGHTS) and not file.startswith("original/"):
            for name, tensor in read_headers(root / file, PublishError).items():
                key = (os.path.dirname(file), name)
                if key in counted:  # the same in another precision: a variant
                    continue
                counted.add(key)
                parameters[_part(file, name, whole)] += prod(tensor.shape)
                dtypes[tensor.dtype] += prod(tensor.shape)
    decoders = {
        folder: _decoder_kind(root / folder) for folder in DECODER_FOLDERS if f"{folder}{MODEL_INDEX}" in files
    }
    return Facts(
        config,
        dict(parameters),
        [name for name, _ in dtypes.most_common()],
        decoders,
        _read_results(root),
        _read_guidance(root),
        adapter,
        has_processor="processor_config.json" in files,
    )


def is_adapter(root: Path) -> bool:
    """Whether a directory holds an adapter of PEFT.

    Raises:
        PublishError: If it holds a model, too.
    """
    found = (root / ADAPTER_CONFIG_NAME).is_file()
    if found and (root / "config.json").is_file():
        raise PublishError(f"{root} holds adapters of LoRA beside a model: keep them in a directory of their own.")
    return found


def read_config(root: Path) -> Any:
    """Reads the configuration of a checkpoint.

    Raises:
        PublishError: If it is neither a LaVIT nor a visual tokenizer.
    """
    if is_adapter(root):
        raise PublishError(f"{root} holds adapters of LoRA, not a whole LaVIT: merge them into their base first.")
    path = root / "config.json"
    if not path.is_file():
        raise PublishError(f"{root} is not a LaVIT checkpoint: it has no config.json.")
    model_type = read_object(path).get("model_type")
    if model_type not in _MODEL_TYPES:
        raise PublishError(f"{root} is not a LaVIT checkpoint: its config.json is of a {model_type!r:.100} model.")
    try:
        return AutoConfig.from_pretrained(root)
    except Exception as error:  # of any kind: the classes of configurations check values in ways of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PublishError(f"{path} is not a usable configuration: {reason}") from error


def read_adapter(root: Path) -> AdapterFacts:
    """Reads the configuration of an adapter."""
    content = read_adapter_config(root, PublishError)
    rows = {"Kind": f"{content['peft_type']}, of PEFT"}
    names = {"Rank": "r", "Scale (alpha)": "lora_alpha", "Adapted": "target_modules", "Whole": "modules_to_save"}
    for row, name in names.items():
        value = content.get(name)
        values = value if isinstance(value, list) else [value]
        if not all(one is None or isinstance(one, (str, int, float)) for one in values):
            raise PublishError(f"{root / ADAPTER_CONFIG_NAME}: {name} is {value!r:.100}, which no adapter has.")
        if value not in (None, []):
            rows[row] = ", ".join(sorted(map(str, values)))
    return AdapterFacts(content.get("base_model_name_or_path"), rows)


def _decoder_kind(folder: Path) -> str:
    """The word of model cards for what `decoder=` of pipelines tells apart: only one has a pooled condition."""
    path = folder / "token_decoder" / "config.json"
    config = read_object(path) if path.is_file() else {}
    return "low-resolution" if config.get("pooled_size", 0) is None else "high-resolution"


def _read_guidance(root: Path) -> float:
    path = root / _GENERATION
    value = read_object(path).get(_GUIDANCE_NAME) if path.is_file() else None
    if value is None:
        return _GUIDANCE
    if not _is_number(value):
        raise PublishError(f"{path}: {_GUIDANCE_NAME} is {value!r:.100}, which is no number.")
    return float(value)


def world_of(checkpoint: str) -> World | None:
    """The world that a checkpoint was measured on first, by its `metrics.json`; `None` if it was none.

    Args:
        checkpoint: Directory, or name on the Hub.

    Raises:
        OSError: If that file is damaged.
    """
    for name in METRICS:
        if path := find_file(checkpoint, name, {}):
            return world_of_results(read_json_object(path).get("results") or ())
    return None


def world_of_results(results: Iterable[Any]) -> World | None:
    """The first world that results of `metrics.json` are about; `None` if they are about none."""
    found = [result.get("data") for result in results if isinstance(result, dict)]
    return next((find_world(data) for data in found if data in WORLDS), None)


def _part(file: str, name: str, whole: str) -> str:
    folder, _, _ = file.rpartition("/")
    if folder:
        return folder
    is_of_tokenizer = whole == "language model" and ".visual_tokenizer." in f".{name}"
    return "visual tokenizer" if is_of_tokenizer else whole


def _read_results(root: Path) -> list[dict[str, Any]]:
    path = next((root / name for name in METRICS if (root / name).is_file()), None)
    if path is None:
        return []
    refused = f"{path} is not what `lavit evaluate` writes: "
    results = read_object(path).get("results")
    if not isinstance(results, list):
        raise PublishError(f"{refused}it has no list of results.")
    for number, result in enumerate(results):
        if problem := _problem(result, _RESULT):
            raise PublishError(f"{refused}results[{number}] {problem}.")
        for name, measurement in result["metrics"].items():
            if problem := _problem(measurement, _MEASUREMENT):
                raise PublishError(f"{refused}results[{number}] has the metric {name!r:.100}, which {problem}.")
    return results


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _problem(values: Any, checks: Mapping[str, Callable[[Any], bool]]) -> str | None:
    """What is wrong with an object of which every value has to pass its check."""
    if not isinstance(values, Mapping):
        return "is no object"
    wrong = [name for name, check in checks.items() if not check(values.get(name))]
    return f"has {values.get(wrong[0])!r:.100} for `{wrong[0]}`" if wrong else None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


_RESULT = {"task": _is(str), "data": _is(str), "split": _is(str, type(None)), "metrics": _is(Mapping)}
_MEASUREMENT: dict[str, Callable[[Any], bool]] = {
    "value": lambda value: value is None or _is_number(value),
    "interval": lambda value: value is None or _is_interval(value),
    "n": lambda value: type(value) is int,
    "unit": _is(str),
    "is_share": _is(bool, type(None)),
}
