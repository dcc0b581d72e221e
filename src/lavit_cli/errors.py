"""How commands end when something is wrong: one line, and an exit code that says what kind of end it was."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LISTED = 6  # lines of a longer message, such as a list of tensors, that still fit one line

_Command = TypeVar("_Command", bound=Callable[..., Any])


def one_line(error: BaseException) -> str:
    """Says what went wrong in one line, with the type of an error that is not made for users.

    Of a long message, such as a list of missing tensors, only the beginning is kept.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if len(lines) > _LISTED + 1:
        lines = [*lines[:_LISTED], f"and {len(lines) - _LISTED} more (lavit --debug shows all)"]
    message = " ".join(lines[:1]) + (" " + "; ".join(lines[1:]) if len(lines) > 1 else "")
    if isinstance(error, (OSError, ValueError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _write_failure(error: Exception) -> str | None:
    """What could not be written, such as on a full disk, of which libraries say little; `None` of other errors."""
    files = sys.modules.get("lavit_hf.utils.atomic_files")  # before it is imported, nothing has been written
    failure = files.write_failure(error) if files else None
    return failure and f"{failure}. Make room, or choose another directory."


def in_one_line(command: _Command) -> _Command:
    """Makes a command report errors in one line and exit with 1, or with 130 if it was interrupted."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("lavit: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if os.environ.get("LAVIT_DEBUG"):
                raise
            typer.echo(f"lavit: error: {_write_failure(error) or one_line(error)}", err=True)
            raise typer.Exit(1) from None

    return wrapper  # type: ignore[return-value]
