"""Fields of annotation files: there, of their type, and text that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...processing.tokenization_lavit import check_text

_NAMES = {int: "an integer", str: "a text", list: "a list"}
_T = TypeVar("_T", int, str, list)


def read_field(row: Any, name: str, kind: type[_T], where: str) -> _T:
    """A field of a row.

    Args:
        row: The row, which should be an object of JSON.
        name: The field.
        kind: `int`, `str` or `list`.
        where: What the row is, such as `"images[7]"`, for the error.

    Raises:
        ValueError: If it is missing, or something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r:.60} instead of an object with {name}.")
    if name not in row:
        raise ValueError(f"{where} is incomplete: it has no {name}.")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name} is {value!r:.60}, expected {_NAMES[kind]}.")
    try:
        check_text(value if isinstance(value, str) else None)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from error
    return value


def read_texts(row: Any, name: str, part: str, where: str) -> tuple[str, ...]:
    """The texts in a field that holds a list of objects with one text each, such as `[{"answer": "yes"}]`.

    Raises:
        ValueError: If it is something else, or empty.
    """
    parts = read_field(row, name, list, where)
    if not parts:
        raise ValueError(f"{where}: {name} is empty.")
    return tuple(read_field(one, part, str, f"{where}, {name}[{index}]") for index, one in enumerate(parts))


def read_kind(row: Mapping[str, Any], name: str, where: str) -> str:
    """The kind of a question, `"other"` where a row does not say."""
    return "other" if row.get(name) is None else read_field(row, name, str, where)


__all__ = ["read_field", "read_kind", "read_texts"]
