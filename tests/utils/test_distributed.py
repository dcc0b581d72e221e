"""Processes that belong together; tests of training and evaluation start several."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from lavit_hf.utils.distributed import process_state


def test_processes_wait_longer_than_any_scoring_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: after 10 minutes of FID or CLIP in the first process, NCCL ended the others."""
    options: dict[str, Any] = {}

    def join(**given: Any) -> SimpleNamespace:
        options.update(given)
        return SimpleNamespace(num_processes=2)

    monkeypatch.setattr("accelerate.PartialState", join)
    monkeypatch.setenv("WORLD_SIZE", "2")
    process_state("cuda")
    assert options["timeout"] >= timedelta(hours=12) and options["cpu"] is False
