"""A Hub that does not answer, or not in time: what users are told, and whether something may have changed."""

import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lavit_hf.hub import PublishError, publish, publish_space
from lavit_hf.hub.uploads import UPLOAD_ERRORS

HTTP = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
"""The HTTP library of the client."""


def answer(status: int) -> HfHubHTTPError:
    request = HTTP.Request("POST", "http://hub")
    return HfHubHTTPError("An answer.", response=HTTP.Response(status, request=request))


def fail(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> None:
    """One request of the client fails; those before it do nothing."""

    def fails(*_: Any, **options: Any) -> None:
        raise error

    for name in ("create_repo", "list_repo_files", "create_commit"):
        monkeypatch.setattr(HfApi, name, fails if name == method else lambda *_, **options: [])


def test_errors_of_the_http_library_are_known() -> None:
    for error in (HTTP.ConnectError, HTTP.ConnectTimeout, HTTP.ReadTimeout, HTTP.RemoteProtocolError, HfHubHTTPError):
        assert issubclass(error, UPLOAD_ERRORS)
    assert not issubclass(OSError, UPLOAD_ERRORS) and not issubclass(ValueError, UPLOAD_ERRORS)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    """Regression: users saw an error of the HTTP library."""
    fail(monkeypatch, "create_repo", HTTP.ConnectError("Connection refused"))
    with pytest.raises(PublishError, match="me/tiny was not changed: ConnectError: Connection refused"):
        publish(tiny_checkpoint, "me/tiny")
    with pytest.raises(PublishError, match="The Space me/page was not changed: ConnectError: Connection refused"):
        publish_space("me/page", "me/tiny", tiny_checkpoint)
    fail(monkeypatch, "list_repo_files", HTTP.ReadTimeout(""))
    with pytest.raises(PublishError, match=r"me/tiny was not changed: ReadTimeout\. The same command goes on"):
        publish(tiny_checkpoint, "me/tiny")


@pytest.mark.parametrize("error", [HTTP.ReadTimeout("timed out"), HTTP.RemoteProtocolError("closed"), answer(504)])
def test_a_commit_that_is_not_confirmed(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, error: Exception
) -> None:
    fail(monkeypatch, "create_commit", error)
    with pytest.raises(PublishError, match="^me/tiny may have been changed: the Hub did not say"):
        publish(tiny_checkpoint, "me/tiny")
    with pytest.raises(PublishError, match="^The Space me/page may have been changed: the Hub did not say"):
        publish_space("me/page", "me/tiny", tiny_checkpoint)


@pytest.mark.parametrize("error", [answer(400), RuntimeError("Error while uploading 'a' to the Hub.")])
def test_a_commit_that_was_refused(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, error: Exception) -> None:
    fail(monkeypatch, "create_commit", error)
    with pytest.raises(PublishError, match="^me/tiny was not changed: "):
        publish(tiny_checkpoint, "me/tiny")
