"""`lavit evaluate`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import TASKS, EvaluatedCheckpoint, Task, evaluate, format_metrics, read_data
from ..utils.distributed import process_state
from .draw import load_pipeline
from .loading import load, resolve_device

ALL = "all"


def run(
    checkpoint: str,
    *,
    tasks: Sequence[str],
    output: Path,
    splits: Sequence[str],
    num_samples: int | None,
    num_drawings: int | None,
    reading: Mapping[str, Any],
    options: Mapping[str, Any],
    batch_size: int,
    seed: int,
    num_shown: int,
    device: str,
    dtype: str,
) -> None:
    """Evaluates a checkpoint; the first process prints what became of it."""
    state = process_state(resolve_device(device))
    if device == "auto" and state.num_processes > 1:
        device = str(state.device)  # each process its own
    names = list(TASKS) if ALL in tasks else list(dict.fromkeys(tasks))
    with state.main_process_first():  # so that one process fills the cache of `datasets`
        todo = []
        for name in names:
            count = num_drawings if TASKS[name].draws and num_drawings else num_samples
            for split in list(dict.fromkeys(splits)) or [None]:
                todo.append(_build_task(name, split, count, reading, options, seed))
    _check_options(todo, options)
    lavit = load(checkpoint, device, dtype)
    evaluated = EvaluatedCheckpoint(checkpoint, lavit.model, lavit.processor, functools.partial(load_pipeline, lavit))
    metrics = evaluate(evaluated, todo, output, batch_size=batch_size, num_shown=num_shown)
    if state.is_main_process:
        print(format_metrics(metrics))
        print(f"\nWrote {output / 'metrics.json'}")
    state.destroy_process_group()


def _check_options(tasks: Sequence[Task], options: Mapping[str, Any]) -> None:
    """Refuses an option that would be ignored."""
    known = {option for task in tasks for option in task.options}
    for option, value in options.items():
        if value is not None and option not in known:
            raise ValueError(f"None of the tasks has a use for {option}={value}.")


def _build_task(
    name: str,
    split: str | None,
    num_samples: int | None,
    reading: Mapping[str, Any],
    options: Mapping[str, Any],
    seed: int,
) -> Task:
    data = read_data(task=name, split=split, num_samples=num_samples, **reading)
    known = TASKS[name].default_options(data)
    return TASKS[name](data, {option: value for option, value in options.items() if option in known}, seed)
