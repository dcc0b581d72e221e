"""Two halves of the drawing of many batches at the same time: codes of the next, and pixels of the last.

On a GPU the language model is busy with reading its weights, and the U-Net with products. Codes stay in the caller's
thread, where `generate` compiles its steps, and wait for the GPU after each of them. Pixels get a thread, so that
Python launches them meanwhile, and a stream, so that codes do not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

_Batch = TypeVar("_Batch")
_Written = TypeVar("_Written")
_Drawn = TypeVar("_Drawn")


def write_and_draw(
    batches: Iterable[_Batch],
    write: Callable[[_Batch], _Written],
    draw: Callable[[_Written], _Drawn],
    overlap_on: torch.device | None = None,
) -> list[_Drawn]:
    """Writes the codes of every batch, and draws them.

    Args:
        batches: What `write` takes.
        write: The first half. What it returns must be ready, as it is used on another stream.
        draw: The second half. It must share no state with the first, such as a source of randomness.
        overlap_on: A device on which a batch is drawn while the next one is written; `None` for one after the other.

    Returns:
        What was drawn, in order. An error of either half is raised when no half is at work any more.
    """
    if overlap_on is None:
        return [draw(write(batch)) for batch in batches]
    stream = torch.cuda.Stream(overlap_on) if overlap_on.type == "cuda" else None
    is_inference = torch.is_inference_mode_enabled()  # threads start without

    def draw_aside(written: _Written) -> _Drawn:
        with torch.inference_mode(is_inference), nullcontext() if stream is None else torch.cuda.stream(stream):
            drawn = draw(written)
            if stream is not None:
                stream.synchronize()
            return drawn

    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(overlap_on))
    drawn: list[_Drawn] = []
    last: Future[_Drawn] | None = None
    with ThreadPoolExecutor(1, "lavit-pixels") as thread:  # waits for the thread, whatever happens
        for batch in batches:
            written = write(batch)
            if last is not None:
                drawn.append(last.result())
            last = thread.submit(draw_aside, written)
        if last is not None:
            drawn.append(last.result())
    return drawn


def can_overlap(*parts: Any) -> bool:
    """Whether models can work at the same time: all on the same GPU, where none of them comes and goes."""
    device = parts[0].device
    is_moved = any(hasattr(module, "_hf_hook") for part in parts for module in part.modules())  # by accelerate
    is_together = all(part.device == device for part in parts)
    return device.type == "cuda" and is_together and not is_moved and not torch.is_autocast_enabled("cuda")
