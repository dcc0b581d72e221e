"""The files of a checkpoint: which hold its weights, and whether the configuration fits them.

Ten million layers would be built for hours, and another vocabulary would be refused after gigabytes were read. The
headers of safetensors tell within milliseconds.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from .file_errors import file_in, name_file

_HUB_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

# Values that say how often something is built, such as `num_hidden_layers` and `layers_per_block`.
_COUNT = re.compile(r"(^|_)(layers?|experts)(_|$)")

# So many layers are built on the meta device in about a second, and may be missing from the weights as tensors may.
_BUILT_IN_SECONDS = 1000

# Named instead of a file where a caller asks for other numbers of layers, of which transformers loads what there is.
_GIVEN = "The given configuration"

Shapes = dict[str, list[int]]


class CheckedLoadingMixin:
    """Loads a model of transformers after its configuration was compared with the headers of its weights."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """See [`PreTrainedModel.from_pretrained`].

        Raises:
            OSError: If a file is missing or corrupt; it is named.
            ValueError: If the configuration is impossible, or does not fit the weights (unless
                `ignore_mismatched_sizes=True`).
        """
        check_checkpoint(cls, pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[arg-type]
        with name_corrupt_weights(pretrained_model_name_or_path):
            return super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, **kwargs
            )


def check_checkpoint(
    model_class: type[PreTrainedModel], checkpoint: str | os.PathLike | None, *model_args: Any, **kwargs: Any
) -> None:
    """Compares the files of a checkpoint with each other before they are loaded.

    Pickles and GGUF have no header to compare with.

    Args:
        model_class: The model to load.
        checkpoint: Directory or Hub id.
        model_args: Those of its `from_pretrained`.
        kwargs: Those of its `from_pretrained`.

    Raises:
        OSError: If a file of weights is unreadable, or its index is wrong.
        ValueError: If the configuration does not fit the weights.
    """
    if checkpoint is None or kwargs.get("gguf_file") is not None or kwargs.get("use_safetensors") is False:
        return
    hub_kwargs = hub_options(kwargs)
    shards = find_safetensors(checkpoint, kwargs.get("variant"), hub_kwargs)
    if not shards:  # adapters or pickles, or nothing at all, which transformers has an error for
        return
    rest = dict(kwargs)
    config = load_config(model_class, checkpoint, hub_kwargs, rest)
    shapes = read_shapes(checkpoint, shards, hub_kwargs)
    file = file_in(os.path.join(checkpoint, kwargs.get("subfolder") or ""), "config.json")
    if len(rest) < len(kwargs) and not _counts_as_stored(config, checkpoint, hub_kwargs):
        file = _GIVEN
    ignore = bool(kwargs.get("ignore_mismatched_sizes"))
    check_config(model_class, config, shapes, file, *model_args, ignore=ignore)
    if model_class.can_generate() and kwargs.get("generation_config") is None:
        path = cached_file(
            checkpoint, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if path is not None:  # transformers would do without it if it is broken
            with name_file(path):
                GenerationConfig.from_pretrained(*os.path.split(path))


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that locate files."""
    return {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}


def load_config(
    model_class: type[PreTrainedModel],
    checkpoint: str | os.PathLike,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedConfig:
    """The configuration that `from_pretrained` would take; takes its arguments out of `kwargs`."""
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config
    config_class = model_class.config_class
    assert config_class is not None
    # As in transformers, keyword arguments that name a configuration value override it.
    known = config_class.__dataclass_fields__.keys() - {"dtype"}
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    return config_class.from_pretrained(config or checkpoint, **hub_kwargs, **overrides)


def find_safetensors(
    checkpoint: str | os.PathLike, variant: str | None, hub_kwargs: dict[str, Any]
) -> dict[str, list[str]]:
    """The files of weights that transformers would load, and which tensors the index says that each holds.

    Args:
        checkpoint: Directory or Hub id.
        variant: Such as `"fp16"`.
        hub_kwargs: What locates it.

    Returns:
        Tensors by file; without an index none are listed, and without safetensors there are no files.

    Raises:
        OSError: If the index is unreadable, or names files elsewhere.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        path = cached_file(
            checkpoint, with_variant(name, variant), _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if path is not None:
            return {with_variant(name, variant): []} if name == SAFE_WEIGHTS_NAME else _read_index(path)
    return {}


def _read_index(path: str) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = defaultdict(list)
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        for name, shard in weight_map.items():
            shards[shard].append(name)
            if not shard or Path(shard).name != shard:
                raise ValueError(f"{shard!r} is not the name of a file beside it")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise OSError(f"{path} is no index of weights: {error}. Download or convert it again.") from error
    if not shards:
        raise OSError(f"{path} is no index of weights: it lists none. Download or convert it again.")
    return dict(shards)


def read_shapes(
    checkpoint: str | os.PathLike, shards: Mapping[str, Iterable[str]], hub_kwargs: dict[str, Any]
) -> Shapes:
    """Reads the shapes of all tensors out of the headers.

    Args:
        checkpoint: Directory or Hub id.
        shards: See [`find_safetensors`].
        hub_kwargs: What locates it.

    Raises:
        OSError: If a file is missing or unreadable, or lacks a tensor that the index lists.
    """
    shapes: Shapes = {}
    paths = cached_files(checkpoint, list(shards), **hub_kwargs)
    for path, listed in zip(paths, shards.values(), strict=True):
        with name_corrupt_weights(path), safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if missing := sorted(set(listed) - found.keys()):
            raise OSError(f"{path} lacks {missing[0]}, which the index lists. Download or convert it again.")
        shapes |= found
    return shapes


def check_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    shapes: Shapes,
    file: str | None,
    *model_args: Any,
    ignore: bool = False,
) -> None:
    """Compares a configuration with the weights it stands beside: numbers of layers, and shapes.

    Tensors that only one side has are left to transformers, which reports them.

    Args:
        model_class: The model of that configuration.
        config: The configuration.
        shapes: What the headers of the weights say.
        file: What to name in errors.
        model_args: For the model.
        ignore: Whether to take differences as intended, as `ignore_mismatched_sizes` does.

    Raises:
        ValueError: If they do not fit.
    """
    values = dict(_flatten(config.to_dict()))
    check_counts(values, max(len(shapes), _BUILT_IN_SECONDS), file)
    # A subclass may need arguments that are nobody else's business.
    if ignore or model_args or not _is_ours(model_class):
        return
    # On the meta device a model of any size costs a moment and no memory.
    with name_file(file), _as_value_error(), torch.device("meta"), init.no_init_weights():
        model = model_class(copy.deepcopy(config), *model_args)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model_class.base_model_prefix}."
    forms = (shapes, {prefix + name: s for name, s in shapes.items()}, _without_prefix(shapes, prefix))
    found = max(forms, key=lambda form: len(form.keys() & expected.keys()))
    present, wanted = _numbers(found), _numbers(expected)
    for name in sorted(present.keys() & wanted.keys()):
        if present[name] != wanted[name] and file != _GIVEN:
            hint = _hint({key: v for key, v in values.items() if _COUNT.search(key)}, {len(wanted[name])})
            raise ValueError(
                f"{file} does not fit the weights{hint}: it describes {len(wanted[name])} of {name}, but the weights "
                f"have {len(present[name])}. (`ignore_mismatched_sizes=True` loads them nevertheless.)"
            )
    if getattr(config, "quantization_config", None) is not None:  # packed weights have other shapes
        return
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            sizes = set(expected[name]) - set(found[name])
            raise ValueError(
                f"{file} does not fit the weights{_hint(values, sizes)}: {name} would have the shape "
                f"{expected[name]}, but the weights have {found[name]}. (`ignore_mismatched_sizes=True` loads the "
                "others nevertheless.)"
            )


def _counts_as_stored(config: PreTrainedConfig, checkpoint: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a configuration that was passed has the numbers of layers of the file, as that of an Auto class has."""
    path = cached_file(checkpoint, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if path is None:
        return False
    with name_file(path):
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    values = dict(_flatten(config.to_dict()))
    return all(values.get(name, value) == value for name, value in _flatten(stored) if _COUNT.search(name))


def _is_ours(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model is made of its configuration alone, as those here are."""
    return model_class.__init__.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_counts(values: Mapping[str, Any], limit: int, file: str | os.PathLike | None) -> None:
    """Refuses numbers of layers that are larger than the number of tensors, before anyone builds so many.

    Args:
        values: A configuration; those of its parts are looked at, too.
        limit: How many tensors the weights have.
        file: What to name in errors.

    Raises:
        ValueError: If there is such a number.
    """
    for name, value in _flatten(values):
        if _COUNT.search(name) and isinstance(value, (int, float)) and value > max(limit, 1):
            raise ValueError(f"{file} does not fit the weights: {name} is {value}, but they have {limit} tensors.")


def _flatten(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values and where they are: `("text_config.vocab_size", 366)`."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flatten(value, f"{name}.{key}".lstrip("."))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _flatten(value, name)
    else:
        yield name, values


def _hint(values: Mapping[str, Any], sizes: set[int]) -> str:
    """The configuration values that may be wrong."""
    names = [f"{name} = {v}" for name, v in values.items() if type(v) is int and v in sizes]
    return f" ({', '.join(names[:4])})" if names else ""


def _without_prefix(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


def _numbers(names: Iterable[str]) -> dict[str, set[str]]:
    """The numbers of modules in a list, by its name: `{"model.layers": {"0", "1"}}`."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdigit():
                numbers[".".join(parts[:position])].add(part)
    return numbers


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Torch has one error for whatever cannot be built, such as sizes below zero."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


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


def with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, as transformers names variants."""
    stem, extension = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{extension}"


__all__ = [
    "CheckedLoadingMixin",
    "check_checkpoint",
    "check_config",
    "check_counts",
    "find_safetensors",
    "hub_options",
    "load_config",
    "name_corrupt_weights",
    "read_shapes",
    "with_variant",
]
