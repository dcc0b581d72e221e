"""The processes that accelerate or torchrun started."""

from __future__ import annotations

import os
from typing import Any

import torch


def process_state(device: torch.device | str) -> Any:
    """Joins the other processes.

    Args:
        device: Where this process computes. Without being told, accelerate takes CPU processes of torchrun for
            strangers, who would all do the same work.

    Returns:
        An `accelerate.PartialState`.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: There are other processes, but accelerate was set up before as if there were none.
    """
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("This needs the package `accelerate`: pip install 'lavit-hf[training]'") from error
    state = PartialState(cpu=torch.device(device).type == "cpu")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but accelerate was set up for {state.num_processes} before. Create "
            "its Accelerator or PartialState with `cpu=True` where processes compute on the CPU."
        )
    return state


__all__ = ["process_state"]
