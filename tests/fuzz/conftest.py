"""Fixtures of the fuzz tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.jobs import Jobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """A whole LaVIT with random weights. Do not write into it."""
    return ROOT / "checkpoints" / "lavit-tiny-random"


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Runs calls in processes of their own."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.close()
