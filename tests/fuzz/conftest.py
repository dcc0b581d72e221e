"""Fixtures of the fuzz tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """A whole LaVIT with random weights. Do not write into it."""
    return ROOT / "checkpoints" / "lavit-tiny-random"


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Runs jobs in processes of their own."""
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.close()
