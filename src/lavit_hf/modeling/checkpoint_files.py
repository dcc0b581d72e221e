"""The files of a checkpoint: errors name them, and weights are checked against configurations."""

from __future__ import annotations

import copy
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from ..utils.json_files import read_json_object
from ..utils.safetensors_files import TensorHeader, read_headers, read_index

# What reading and building from values of a file ends in when they are of other types, missing or out of range.
_UNUSABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError)

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Values that say how often something is built, such as `num_hidden_layers` and `layers_per_block`.
_COUNT = re.compile(r"(^|_)(layers?|experts)(_|$)")

# So many layers are built on the meta device in about a second, and may be missing from the weights as tensors may.
_BUILT_IN_SECONDS = 1000

# Named instead of a file where a caller asks for other numbers of layers, of which transformers loads what there is.
_GIVEN = "The given configuration"

_QUANTIZED = ("I8", "U8", "F8", "F6", "F4")  # how dtypes of 8 bits and less begin in safetensors
Shapes = dict[str, list[int]]
_Model = TypeVar("_Model", bound=PreTrainedModel)


# Errors about what a file holds say which file it is.


@contextmanager
def name_file(file: str | os.PathLike | None) -> Iterator[None]:
    """Turns errors of the body into one that names the file that it builds something from, unless they do already.

    With `None`, errors stay as they are.

    Raises:
        ValueError: If the body raises one of those.
    """
    try:
        yield
    except _UNUSABLE as error:
        if file is None or str(file) in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be used ({type(error).__name__}: {reason[:500]}).") from error


@contextmanager
def built_from(file: str | os.PathLike | None, device: str = "meta") -> Iterator[None]:
    """Has the body build, by default without memory, what a file describes; errors name the file.

    Raises:
        ValueError: If it cannot be built.
    """
    with name_file(file), torch.device(device):
        try:
            yield
        except (ImportError, RuntimeError) as error:  # torch has one error for all that cannot be built
            raise ValueError(str(error)) from error


def file_in(checkpoint: str | os.PathLike | None, name: str) -> str | None:
    """What to call a file of a checkpoint, a directory or a repository of the Hub."""
    if checkpoint is None or os.path.isfile(checkpoint):
        return None if checkpoint is None else str(checkpoint)
    return os.path.join(checkpoint, name)


class NamedConfigMixin:
    """A configuration whose errors name the file that it was read from."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Self:
        """See [`PreTrainedConfig.from_pretrained`].

        Raises:
            OSError: If there is no such file, or it is no JSON.
            ValueError: If values in it are impossible, or do not fit together.
        """
        with name_file(file_in(pretrained_model_name_or_path, "config.json")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """See [`PreTrainedConfig.from_dict`]; `AutoConfig` reads the file itself and says where it is."""
        with name_file(file_in(kwargs.get("name_or_path"), "config.json")):
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


# Configurations are compared with the headers of weights before anything is built: ten million layers would be built
# for hours, and another vocabulary would be refused after gigabytes were read. Headers tell within milliseconds.


class CheckedLoadingMixin:
    """Loads a model of transformers after its configuration was compared with the headers of its weights."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self:
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


def load_complete(model_class: type[_Model], checkpoint: str | os.PathLike, **kwargs: Any) -> _Model:
    """Loads a model by `from_pretrained`, unless tensors are missing, which transformers fills with random numbers.

    Raises:
        OSError: If a file is missing or corrupt.
        ValueError: If tensors are missing, or the configuration does not fit the weights.
    """
    loaded: Any = model_class.from_pretrained(checkpoint, output_loading_info=True, **kwargs)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{checkpoint}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    return model


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
        path = find_file(checkpoint, GENERATION_CONFIG_NAME, hub_kwargs)
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


def find_file(checkpoint: str | os.PathLike, name: str, hub_kwargs: dict[str, Any]) -> str | None:
    """Where a file of a checkpoint is, downloaded if need be.

    Returns:
        Its path; `None` if the checkpoint has no such file, as far as one can tell without a connection.

    Raises:
        OSError: If the Hub cannot be asked, or there is no such repository.
    """
    try:
        return cached_file(checkpoint, name, **hub_kwargs)
    except OSError as error:
        # transformers says in words only what is wrong. Its error has another cause unless the file is just not there.
        if error.errno is None and isinstance(error.__cause__, (LocalEntryNotFoundError, type(None))):
            return None
        raise


def find_safetensors(
    checkpoint: str | os.PathLike, variant: str | None, hub_kwargs: dict[str, Any]
) -> dict[str, list[str]]:
    """The files of weights that transformers would load, and which tensors the index says that each holds.

    Returns:
        Tensors by file; without an index none are listed, and without safetensors there are no files.

    Raises:
        OSError: If the index is unreadable, or names files elsewhere.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        path = find_file(checkpoint, with_variant(name, variant), hub_kwargs)
        if path is not None:
            return {with_variant(name, variant): []} if name == SAFE_WEIGHTS_NAME else read_index(path)
    return {}


def read_shapes(
    checkpoint: str | os.PathLike, shards: Mapping[str, Iterable[str]], hub_kwargs: dict[str, Any]
) -> Shapes:
    """Reads the shapes of all tensors out of the headers of files, see [`_read_tensors`]."""
    return {name: header.shape for name, header in _read_tensors(checkpoint, shards, hub_kwargs).items()}


def _read_tensors(
    checkpoint: str | os.PathLike, shards: Mapping[str, Iterable[str]], hub_kwargs: dict[str, Any]
) -> dict[str, TensorHeader]:
    """Reads the headers of files, see [`find_safetensors`].

    Raises:
        OSError: If a file is missing or unreadable, or lacks a tensor that the index lists.
    """
    tensors: dict[str, TensorHeader] = {}
    paths = cached_files(checkpoint, list(shards), **hub_kwargs)
    assert paths is not None  # it raises where it finds nothing
    for path, listed in zip(paths, shards.values(), strict=True):
        found = read_headers(path)
        if missing := sorted(set(listed) - found.keys()):
            raise OSError(f"{path} lacks {missing[0]}, which the index lists. Download or convert it again.")
        tensors |= found
    return tensors


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
    # A subclass may need arguments that are not known here.
    if ignore or model_args or not _is_ours(model_class):
        return
    # On the meta device a model of any size costs a moment and no memory.
    with built_from(file), init.no_init_weights():
        model = model_class(copy.deepcopy(config), *model_args)
    expected = state_shapes(model)
    prefix = f"{model_class.base_model_prefix}."
    longer = {prefix + name: shape for name, shape in shapes.items()}
    shorter = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    found = max((shapes, longer, shorter), key=lambda form: len(form.keys() & expected.keys()))
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
    for name in differing_shapes(found, expected):
        sizes = set(expected[name]) - set(found[name])
        raise ValueError(
            f"{file} does not fit the weights{_hint(values, sizes)}: {name} would have the shape {expected[name]}, "
            f"but the weights have {found[name]}. (`ignore_mismatched_sizes=True` loads the others nevertheless.)"
        )


def state_shapes(model: torch.nn.Module) -> Shapes:
    """The shapes of all that a model saves."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def differing_shapes(found: Shapes, expected: Shapes) -> list[str]:
    """The names of tensors that both sides have, but in different shapes."""
    return sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])


def _counts_as_stored(config: PreTrainedConfig, checkpoint: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a configuration that was passed has the numbers of layers of the file, as that of an Auto class has."""
    path = find_file(checkpoint, CONFIG_NAME, hub_kwargs)
    if path is None:
        return False
    stored = read_json_object(path, ValueError)
    values = dict(_flatten(config.to_dict()))
    return all(values.get(name, value) == value for name, value in _flatten(stored) if _COUNT.search(name))


def _is_ours(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model is made of its configuration alone, as those here are."""
    return model_class.__init__.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_counts(values: Mapping[str, Any], limit: int, file: str | os.PathLike | None) -> None:
    """Refuses numbers of layers that are larger than the number of tensors, before anyone builds so many.

    Args:
        values: A configuration; those of its parts are looked at, too.
        limit: How many layers there can be at most, such as the number of tensors.
        file: What to name in errors.

    Raises:
        ValueError: If there is such a number.
    """
    for name, value in _flatten(values):
        if _COUNT.search(name) and isinstance(value, (int, float)) and value > max(limit, 1):
            raise ValueError(f"{file} does not fit the weights: {name} is {value}, but they can have {limit} at most.")


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
def name_corrupt_weights(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Turns the bare message of safetensors about an unreadable file into one that says which and what to do.

    Raises:
        OSError: If the body raises a `SafetensorError`.
    """
    try:
        yield
    except SafetensorError as error:
        for file in sorted(Path(checkpoint or "").glob("*.safetensors")):
            read_headers(file)  # an error, if this is the one
        raise OSError(
            f"{checkpoint} is not a readable safetensors file ({error}). Download or convert it again."
        ) from error


def with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, as transformers names variants."""
    stem, extension = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{extension}"


# One sub-model out of a whole checkpoint, without touching the shards of the rest. transformers would load it through
# `base_model_prefix`, but needs every shard of the index for it and leaves what it cannot find at random, with only a
# report.


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
        ValueError: If the checkpoint lacks a tensor of the part, or the configuration does not fit its weights; or if
            the part is quantized, of which only the whole knows how.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError(f"{model_class.__name__} is loaded from safetensors only, not with use_safetensors=False.")
    variant, wants_info = kwargs.pop("variant", None), kwargs.pop("output_loading_info", False)
    hub_kwargs = hub_options(kwargs)
    config = load_config(model_class, checkpoint, hub_kwargs, kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _HUB_KWARGS}
    files, prefix, shapes = _find_part(checkpoint, model_class.base_model_prefix, variant, hub_kwargs)
    ignore = bool(kwargs.get("ignore_mismatched_sizes"))
    check_config(model_class, config, shapes, file_in(checkpoint, "config.json"), *model_args, ignore=ignore)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        path = cached_file(checkpoint, file, **hub_kwargs)
        assert path is not None  # it raises where it finds nothing
        with name_corrupt_weights(path), safe_open(path, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118 - no dictionary
            state_dict |= {name[len(prefix) :]: weights.get_tensor(name) for name in names}
    model, info = loader(None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks these tensors of {model_class.__name__}: {', '.join(sorted(info['missing_keys']))}."
        )
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return (model, info) if wants_info else model


def _find_part(
    checkpoint: str | os.PathLike, part: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[list[str], str, Shapes]:
    """The files that hold tensors of the part, what their names start with, and the shapes by what follows that."""
    shards = find_safetensors(checkpoint, variant, hub_kwargs)
    if not shards:  # its error says what is missing
        cached_file(checkpoint, with_variant(SAFE_WEIGHTS_NAME, variant), **hub_kwargs)
    names = [name for listed in shards.values() for name in listed]
    if names:  # an index tells which of the shards are needed at all
        prefix = _prefix_in(names, part)
        parts = {shard: [name for name in listed if name.startswith(prefix)] for shard, listed in shards.items()}
        shards = {shard: listed for shard, listed in parts.items() if listed}
        tensors = _read_tensors(checkpoint, shards, hub_kwargs)
    else:
        tensors = _read_tensors(checkpoint, shards, hub_kwargs)
        prefix = _prefix_in(tensors, part)
    own = {name: header for name, header in tensors.items() if name.startswith(prefix)}
    for name, header in own.items():
        # It would be taken for the weights themselves. A part alone, not quantized by itself, does not know how.
        if prefix and header.dtype.startswith(_QUANTIZED):
            raise ValueError(
                f"{checkpoint}: {name} is quantized ({header.dtype}); {part} alone cannot be loaded from it. Load the "
                "whole model; a processor takes it as visual_tokenizer=model."
            )
    return list(shards), prefix, {name[len(prefix) :]: header.shape for name, header in own.items()}


def _prefix_in(names: Any, part: str) -> str:
    """Prefix of the part's tensors in a whole model, in its base model, or in a checkpoint of the part alone."""
    for candidate in (f"model.{part}.", f"{part}."):
        if any(name.startswith(candidate) for name in names):
            return candidate
    return ""
