"""What the client of the Hub raises when an upload fails, and what became of the repository then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .files import PublishError

# What the client's HTTP library raises. Which library that is depends on the client's version, so it is found as the
# last class before Python's own that the client's public error is made of.
_HTTP_ERROR = [
    base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base.__module__ != "builtins"
][-1]
UPLOAD_ERRORS = (_HTTP_ERROR, RuntimeError, ConnectionError)
"""The second: a file could not be uploaded. The last: the client was told to stay offline."""


def describe_error(error: Exception) -> str:
    """What an error says; those of the HTTP library may say nothing but their names."""
    if isinstance(error, HfHubHTTPError) or not isinstance(error, _HTTP_ERROR):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": .") + "."


def create_commit(
    api: HfApi,
    repository: str,
    operations: Sequence[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete],
    name: str,
    **options: Any,
) -> CommitInfo:
    """Makes a commit.

    Args:
        api: The client.
        repository: Where.
        operations: What it changes.
        name: How an error calls the repository.
        options: As for `HfApi.create_commit`.

    Raises:
        PublishError: The Hub did not say whether it made the commit, as when the connection was lost.
    """
    try:
        return api.create_commit(repository, operations, **options)
    except _HTTP_ERROR as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        raise PublishError(
            f"{name} may have been changed: the Hub did not say whether it made the commit. The same command again "
            f"makes sure. ({describe_error(error)})"
        ) from error
