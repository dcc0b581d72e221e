"""What conversion raises when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterable


class ConversionError(ValueError):
    """The source, the destination or an option does not allow the conversion. The message is meant for the user."""


def listing(title: str, lines: Iterable[str]) -> str:
    """Formats `lines` as an indented list below `title`."""
    return "\n".join([title, *(f"  {line}" for line in lines)])
