"""Seconds of calls, warm-up apart, and the floors under them: copy bandwidth and the peak of products of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

# The first call compiles, the second records CUDA graphs, the third replays them for the first time. On a CPU, nothing
# of this happens.
WARM_UPS, WARM_UPS_OF_CPU = 3, 1


class Floors(NamedTuple):
    """What a device does at most, measured.

    Attributes:
        bandwidth: Bytes per second that a copy within its memory reads and writes.
        flops: Floating point operations per second of a large product.
    """

    bandwidth: float
    flops: float


@dataclass
class Timing:
    """Seconds of calls.

    Attributes:
        seconds: Of each call after the warm-up.
        warm_up: Of the calls before.
        memory: Bytes of the device that the measured calls held at most; `None` where PyTorch does not count.
    """

    seconds: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def measure(function: Callable[[], Any], device: torch.device, repeats: int, warm_ups: int | None = None) -> Timing:
    """Calls a function to warm up, and then as often as is to be measured."""
    if warm_ups is None:
        warm_ups = WARM_UPS_OF_CPU if device.type == "cpu" else WARM_UPS
    timing = Timing(warm_up=[seconds(function, device) for _ in range(warm_ups)])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing.seconds = [seconds(function, device) for _ in range(repeats)]
    if device.type == "cuda":
        timing.memory = torch.cuda.max_memory_allocated(device)
    return timing


def measure_floors(device: torch.device, dtype: torch.dtype, num_bytes: int, side: int, repeats: int) -> Floors:
    """Copies so many bytes, and multiplies square matrices of that side."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = measure(partial(target.copy_, source), device, repeats)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = measure(lambda: torch.mm(left, right, out=product), device, repeats)
    return Floors(2 * num_bytes / copied.median, 2 * side**3 / multiplied.median)


def count_flops(function: Callable[[], Any]) -> int:
    """Floating point operations of a call's products, a product and a sum counted as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
