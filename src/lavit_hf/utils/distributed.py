"""The processes that accelerate or torchrun started: which one this is, and the few operations that all do together.

Without a process group the latter do nothing.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# Processes wait for one that scores, downloads or fills a cache. One that died ends the others by their launcher.
_LONGEST_WAIT = timedelta(hours=24)


def world_size() -> int:
    """Number of processes that train together, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_sharded_run(args: Any = None) -> bool:
    """Whether weights will be sharded, by FSDP or DeepSpeed.

    Args:
        args: `TrainingArguments`, which may say so; otherwise `accelerate launch` does.
    """
    ways = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    is_launched = any(os.environ.get(way, "false").lower() == "true" for way in ways)
    return is_launched or bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a process holds a part of the weights alone, as with FSDP2 and DeepSpeed's third stage."""
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return any(isinstance(value, DTensor) or hasattr(value, "ds_id") for value in model.parameters())


@torch.compiler.disable
@torch.no_grad()
def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all processes, without gradient; the same bits everywhere."""
    tensor = tensor.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


@torch.compiler.disable
@torch.no_grad()
def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates `[rows, width]` of all processes, which may differ in their number of rows, in order of rank."""
    rows = rows.detach()
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded)
    return torch.cat([part[: int(size)] for part, size in zip(gathered, counts, strict=True)])


@torch.compiler.disable
@torch.no_grad()
def take_from_first_process(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrites `tensor` in place with that of the first process, so that rounding cannot make processes differ."""
    if world_size() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def process_state(device: torch.device | str) -> Any:
    """Joins the other processes, which wait for each other for up to a day; by default it would be minutes.

    Args:
        device: Where this process computes. accelerate does not find out by itself that CPU processes of torchrun
            belong together: each of them would do all of the work.

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
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=_LONGEST_WAIT)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but accelerate was set up for {state.num_processes} before. Create "
            "its Accelerator or PartialState with `cpu=True` where processes compute on the CPU."
        )
    return state
