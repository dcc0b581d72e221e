"""Progress of long work: a bar on a terminal or in a notebook, a line now and then in a log."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch
from huggingface_hub.utils import tqdm
from transformers import StoppingCriteria

# Takes what was done since the last call: bytes, samples, ...
Progress = Callable[[int], object]

_LOG_SECONDS = 30.0
_LOG_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}, {remaining} left]"
_CURSOR = re.compile(r"\x1b\[A|[\r\n]")  # what tqdm moves between bars with
_BYTES = "B"


def progress_bar(
    title: str, total: int | None, show: bool = True, *, unit: str = _BYTES, delay: float = 0.0, leave: bool = True
) -> Any:
    """A bar that counts up to `total`; a `tqdm` of huggingface_hub, whose switches it obeys.

    Args:
        title: What is being done.
        total: Its end; `None` if it is not known.
        show: Whether there is a bar at all.
        unit: What is counted; bytes by default.
        delay: Seconds before anything is shown.
        leave: Whether the bar stays when all is done.
    """
    options = bar_options(title, delay=delay, leave=leave)
    return tqdm(total=total, unit=unit, unit_scale=unit == _BYTES, disable=not show, **options)


def bar_options(title: str, *, delay: float = 0.0, leave: bool = True) -> dict[str, Any]:
    """The same as options of tqdm, such as those of pipelines: `set_progress_bar_config(**bar_options("Drawing"))`."""
    options = {"desc": title, "delay": delay, "leave": leave}
    if sys.stderr.isatty() or _is_notebook():
        return options
    # tqdm looks at the time after every step only if `miniters` is set.
    in_log = {"file": _Lines(sys.stderr), "bar_format": _LOG_LINE, "mininterval": _LOG_SECONDS, "miniters": 1}
    return {**options, **in_log, "delay": max(delay, _LOG_SECONDS)}


def _is_notebook() -> bool:
    """Whether tqdm draws its bars with widgets, whatever stderr is."""
    return any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)


class TokenProgress(StoppingCriteria):
    """Counts the tokens of `generate` on a bar and stops nothing; unlike a streamer it works with beams, too."""

    ignores_ids = True  # LaVIT's `generate` may run on shorter rows, which criteria that look at ids would notice

    def __init__(self, bar: Any):
        self.bar = bar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class _Lines:
    """A file for tqdm that keeps the texts of a bar as lines, and drops what moves the cursor."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := _CURSOR.sub("", text).strip():
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
