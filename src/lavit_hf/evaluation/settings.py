"""What to evaluate a checkpoint on, and how: the settings of `lavit evaluate`, and the tasks that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import read_data
from .data.table import Columns
from .tasks import TASKS, Task


@dataclass
class EvaluationSettings:
    """What to evaluate a checkpoint on, and how.

    Attributes:
        data: What the samples are read from; this and what is not described here is as for [`read_data`].
        tasks: Names of tasks, all by default.
        splits: Every task is evaluated on each of them; by default on the one that `read_data` chooses.
        num_samples: How many images or questions at most, the first ones.
        num_drawings: The same for tasks that draw; `num_samples` by default.
        images: Folder of a file's images.
        annotations: The file with the answers to questions.
        config: Configuration of a dataset.
        revision: Revision of a dataset.
        columns: Columns of a dataset.
        seed: Everything random follows from it.
        options: Options of the tasks by name; `None` leaves one to the task. Each task takes those that it has.
    """

    data: str
    tasks: Sequence[str] = tuple(TASKS)
    splits: Sequence[str] = ()
    num_samples: int | None = None
    num_drawings: int | None = None
    images: str | Path | None = None
    annotations: str | Path | None = None
    config: str | None = None
    revision: str | None = None
    columns: Sequence[str] = Columns()
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def build_tasks(settings: EvaluationSettings) -> list[Task]:
    """Reads the data of every task and split.

    Args:
        settings: What to evaluate on, and how.

    Returns:
        The tasks for [`evaluate`], each on every split.

    Raises:
        ValueError: There is no task of a name, none has a use for an option, or the data do not exist or do not fit.
    """
    if unknown := [name for name in settings.tasks if name not in TASKS]:
        raise ValueError(f"There is no task {unknown[0]!r}; there are {', '.join(TASKS)}.")
    splits = list(dict.fromkeys(settings.splits)) or [None]
    tasks = [_build_task(settings, name, split) for name in dict.fromkeys(settings.tasks) for split in splits]
    known = {option for task in tasks for option in task.options}
    for option, value in settings.options.items():
        if value is not None and option not in known:
            raise ValueError(f"None of the tasks has a use for {option}={value}.")
    return tasks


def _build_task(settings: EvaluationSettings, name: str, split: str | None) -> Task:
    task = TASKS[name]
    data = read_data(
        settings.data,
        name,
        split=split,
        num_samples=(settings.num_drawings if task.draws else None) or settings.num_samples,
        images=settings.images,
        annotations=settings.annotations,
        columns=settings.columns,
        config=settings.config,
        revision=settings.revision,
    )
    own = task.default_options(data)
    return task(data, {option: value for option, value in settings.options.items() if option in own}, settings.seed)


__all__ = ["EvaluationSettings", "build_tasks"]
