"""Errors about what a file holds say which file it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# What reading and building from values of a file ends in when they are of other types, missing or out of range.
_UNUSABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError)


@contextmanager
def name_file(file: str | os.PathLike | None) -> Iterator[None]:
    """Turns errors of the body into one that names a file, unless they do already.

    Args:
        file: The file that the body builds something from; with `None`, errors stay as they are.

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


def file_in(checkpoint: str | os.PathLike | None, name: str) -> str | None:
    """What to call a file of a checkpoint, a directory or a repository of the Hub."""
    if checkpoint is None or os.path.isfile(checkpoint):
        return None if checkpoint is None else str(checkpoint)
    return os.path.join(checkpoint, name)


class NamedConfigMixin:
    """A configuration whose errors name the file that it was read from."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """See [`PreTrainedConfig.from_pretrained`].

        Raises:
            OSError: If there is no such file, or it is no JSON.
            ValueError: If values in it are impossible, or do not fit together.
        """
        with name_file(file_in(pretrained_model_name_or_path, "config.json")):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See [`PreTrainedConfig.from_dict`]; `AutoConfig` reads the file itself and says where it is."""
        with name_file(file_in(kwargs.get("name_or_path"), "config.json")):
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


__all__ = ["NamedConfigMixin", "file_in", "name_file"]
