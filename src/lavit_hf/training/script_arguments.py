"""Options of a training script, from its command line and from a YAML file."""

from __future__ import annotations

import difflib
import os
import types
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser


@dataclass
class ProcessArguments:
    """What every script can be told about its process."""

    sdpa_backend: Literal["flash", "efficient", "cudnn", "math"] | None = field(
        default=None,
        metadata={
            "help": "The only implementation of attention that PyTorch may use; by default it chooses. On a CPU, "
            "'math' is faster for short sequences, such as 64 patches, and slower for long ones."
        },
    )

    def apply(self) -> None:
        """Sets it for the process."""
        if self.sdpa_backend is not None:
            torch.backends.cuda.enable_flash_sdp(self.sdpa_backend == "flash")  # on CPUs, too, whatever its name
            torch.backends.cuda.enable_mem_efficient_sdp(self.sdpa_backend == "efficient")
            torch.backends.cuda.enable_cudnn_sdp(self.sdpa_backend == "cudnn")
            torch.backends.cuda.enable_math_sdp(self.sdpa_backend == "math")


def parse_script_arguments(
    dataclass_types: Iterable[type], arguments: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Parses the options of a script, with `--config FILE.yaml` for defaults of a recipe.

    Keys of the file are options without their dashes. Its values replace the defaults, and the command line replaces
    them, as `TrlParser` of TRL has it. `--help` shows the defaults, with a file those of the file. Every script also
    has the options of `ProcessArguments`, which are applied at once.

    Args:
        dataclass_types: What the options are of, such as `TrainingArguments`.
        arguments: The command line; by default that of this process.
        description: Text of `--help`.

    Returns:
        An object of each type.

    Raises:
        SystemExit: After `--help`; or with a line on stderr that says what is wrong with the options or the file.
    """
    known = [*dataclass_types, ProcessArguments]
    path = _find_config(arguments)
    parser = _ScriptParser(known, description=description)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Values of options; the command line goes before them.", default=path
    )
    if path is not None:
        try:
            parser.set_file_defaults(check_recipe(read_recipe(path), known, path))
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    *parsed, process, rest = parser.parse_args_into_dataclasses(None if arguments is None else list(arguments))
    if rest.config != path:  # argparse takes what is short for it
        parser.error("write --config in full, and once")
    process.apply()
    return tuple(parsed)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of names and values, which are not checked against any options.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no YAML, or holds something else, or a name twice.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold a YAML mapping, lines of `name: value`; it holds {_name_of(content)}.")
    return content


def check_recipe(
    values: Mapping[str, Any], dataclass_types: Iterable[type], path: str | os.PathLike[str]
) -> dict[str, Any]:
    """Checks names and values of a file against the fields of dataclasses.

    Args:
        values: What the file holds.
        dataclass_types: What its names are fields of.
        path: The file, for messages.

    Returns:
        The values, numbers as their fields have them: YAML reads `1e-5` as text. A mapping, or the text of its first
        field, becomes a dataclass where the field is one.

    Raises:
        ValueError: A name is of no option, or a value has another type.
    """
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        types_of_fields = get_type_hints(dataclass_type)
        hints |= {field.name: types_of_fields[field.name] for field in fields(dataclass_type) if field.init}
    checked = {}
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f" Did you mean {close[0]}?" if close else " --help lists all options."
            raise ValueError(f"{path}: {str(name)[:80]!r} is no option of this script.{hint}")
        try:
            result = _convert(value, hints[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        if result is MISSING:
            raise ValueError(f"{path}: {name} has to be {_describe(hints[name])}; it is {_name_of(value)}.")
        checked[name] = result
    return checked


class _PlainLoader(yaml.SafeLoader):
    """Makes plain values only, and refuses a name that stands twice, of which one would be dropped in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a name stands here twice", node.start_mark)
        return mapping


class _ScriptParser(HfArgumentParser):
    """Gives options other defaults after they have been declared."""

    def __init__(self, dataclass_types: list[Any], **kwargs: Any) -> None:
        self._declared: list[Action] = []
        super().__init__(dataclass_types, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Also remembers the option."""
        action = super().add_argument(*args, **kwargs)
        self._declared.append(action)
        return action

    def set_file_defaults(self, values: Mapping[str, Any]) -> None:
        """Makes these the defaults, and their options optional."""
        self.set_defaults(**values)
        for action in self._declared:
            if action.dest in values:
                action.required = False


def _find_config(arguments: Sequence[str] | None) -> str | None:
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", metavar="FILE.yaml")
    found: str | None = finder.parse_known_args(arguments)[0].config
    return found


def _convert(value: Any, hint: Any) -> Any:
    """The value as its field has it; `MISSING` if it does not fit."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = get_args(hint)
        # As it is, before anything that it could be turned into.
        found = [_convert(value, part) for part in sorted(parts, key=lambda part: not _is_of(value, part))]
        return next((result for result in found if result is not MISSING), MISSING)
    if origin is Literal:
        return value if value in get_args(hint) else MISSING
    if origin is list:
        if not isinstance(value, list):
            return MISSING
        items = [_convert(item, get_args(hint)[0]) for item in value]
        return MISSING if MISSING in items else items
    if is_dataclass(hint):
        return _convert_to_dataclass(value, hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value if value in [member.value for member in hint] else MISSING
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return MISSING
        try:
            return float(value)
        except ValueError:
            return MISSING
    return value if _is_of(value, hint) or hint is Any else MISSING


def _convert_to_dataclass(value: Any, hint: Any) -> Any:
    hints = get_type_hints(hint)
    if isinstance(value, str):
        value = {fields(hint)[0].name: value}
    if not isinstance(value, dict):
        return MISSING
    converted = {}
    for name, item in value.items():
        if name not in hints:
            raise ValueError(f"{str(name)[:80]!r} is none of {', '.join(hints)}.")
        converted[name] = _convert(item, hints[name])
        if converted[name] is MISSING:
            raise ValueError(f"{name} has to be {_describe(hints[name])}; it is {_name_of(item)}.")
    if missing := [one.name for one in fields(hint) if one.default is MISSING and one.name not in converted]:
        raise ValueError(f"{value!r:.80} lacks {missing[0]}.")
    return hint(**converted)


def _is_of(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    """A type, in the words of a YAML file."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each item {_describe(get_args(hint)[0])}"
    if is_dataclass(hint):
        return "a mapping of " + ", ".join(one.name for one in fields(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return _NAMES.get(get_origin(hint) or hint, str(hint))


_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _name_of(value: Any) -> str:
    kind = _NAMES.get(type(value), f"a {type(value).__name__}")
    return f"{value!r:.60}" if isinstance(value, (bool, int, float, str)) else "empty" if value is None else kind
