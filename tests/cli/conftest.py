"""Runs `lavit` within the test's process, and undoes what it changes there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

import lavit_cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`lavit` quiets transformers, and --debug sets a variable; other tests must not notice."""
    monkeypatch.setenv("LAVIT_DEBUG", "")  # so that monkeypatch restores it
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.fixture
def lavit():
    """Calls `lavit` with arguments and returns click's result."""

    def run(*arguments: object):
        return CliRunner().invoke(lavit_cli.app, [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def photo() -> Path:
    """The picture of the demo."""
    return ROOT / "examples" / "images" / "chelsea.jpg"


@pytest.fixture(scope="session")
def random_checkpoint() -> Path:
    """The checkpoint in the repository."""
    return ROOT / "checkpoints" / "lavit-tiny-random"
