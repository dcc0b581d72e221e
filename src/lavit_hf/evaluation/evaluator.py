"""Evaluates a checkpoint: predictions by all processes, then scores and a page of samples by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.public_text import public_name, without_paths
from ..utils.atomic_files import write_json
from ..utils.distributed import process_state
from ..utils.json_files import read_json_object
from ..utils.progress import progress_bar
from .checkpoint import EvaluatedCheckpoint
from .predictions import PredictionDirectory
from .samples_page import write_samples_page
from .tasks import Task
from .versions import library_versions

METRICS = "metrics.json"


def evaluate(
    checkpoint: EvaluatedCheckpoint,
    tasks: Sequence[Task],
    output: str | Path,
    *,
    batch_size: int = 32,
    num_shown: int = 36,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a checkpoint on tasks, one after another.

    Processes that accelerate or torchrun started share the work. What was interrupted goes on where it stopped; what
    is complete is only scored again. Batches are always of the same samples, whoever computes them, so that the
    predictions are the same to the last bit for any number of processes and interruptions.

    Args:
        checkpoint: Whom to evaluate.
        tasks: What on.
        output: Directory to write: `metrics.json` with the numbers of all tasks, and `TASK/` (or `TASK/SPLIT/` where
            data has splits) with `predictions.jsonl`, `metrics.json`, `samples.html`, `samples.png` and pictures.
            `metrics.json` is made to be published: of paths it has the last part only.
        batch_size: Samples at a time.
        num_shown: How many samples the page shows: always the first ones.
        progress: Whether to show bars.

    Returns:
        The content of `metrics.json`, in all processes.

    Raises:
        ValueError: There is something else in `output`, or an image cannot be read.
    """
    output = Path(output)
    state = process_state(checkpoint.model.device)
    for task in tasks:
        task.follow(checkpoint.model.generation_config)
    folders = [_folder(output, task) for task in tasks]
    if len(set(folders)) < len(folders):
        raise ValueError("Every task can be evaluated once per split.")
    if state.is_main_process:
        for task in tasks:
            task.metrics  # noqa: B018  # loads them: whatever is missing had better be known before hours of work
    for task, folder in zip(tasks, folders, strict=True):
        directory = PredictionDirectory(folder)
        settings = _settings(checkpoint, task, batch_size)
        with state.main_process_first():
            directory.open(settings)
        _predict(checkpoint, task, directory, state, batch_size, progress)
        if state.is_main_process:
            _report(checkpoint, task, directory, settings, num_shown)
        state.wait_for_everyone()
    if state.is_main_process:
        results = [read_json_object(folder / METRICS) for folder in folders]
        common = {"checkpoint": public_name(checkpoint.name), "versions": library_versions()}
        write_json(output / METRICS, {**common, "results": results})
    state.wait_for_everyone()
    return read_json_object(output / METRICS)


def _folder(output: Path, task: Task) -> Path:
    return output / task.name / task.data.split if task.data.split else output / task.name


def _settings(checkpoint: EvaluatedCheckpoint, task: Task, batch_size: int) -> dict[str, Any]:
    """What must not change between two runs into the same directory."""
    settings = {
        "data_digest": task.data.digest(),
        **task.settings(),
        **checkpoint.settings(),
        # Kernels of half precision round differently in batches of other sizes.
        "batch_size": None if checkpoint.model.dtype == torch.float32 else batch_size,
    }
    if task.draws:
        settings.update(checkpoint.pixel_decoder_settings(task.options["decoder"]))
    return settings


@torch.no_grad()
def _predict(
    checkpoint: EvaluatedCheckpoint,
    task: Task,
    directory: PredictionDirectory,
    state: Any,
    batch_size: int,
    progress: bool,
) -> None:
    """This process's share of what is not finished yet."""
    samples = task.data.samples
    finished = directory.finished()
    state.wait_for_everyone()  # before anyone writes to what others are still reading
    if len(finished) == len(samples):
        return
    bar = progress_bar(task.name, len(samples), progress and state.is_main_process, unit="sample")
    batches = range(0, len(samples), batch_size)
    with bar, directory.writer(state.process_index) as writer:
        for number, start in enumerate(batches):
            batch = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
            is_mine = number % state.num_processes == state.process_index
            # A batch of which anything is missing is computed as a whole, so that it stays the same batch.
            if is_mine and any(sample.id not in finished for sample in batch):
                for sample, prediction in zip(batch, task.predict(checkpoint, batch), strict=True):
                    if sample.id not in finished:
                        record = {
                            "id": sample.id,
                            "question": sample.question,
                            "references": list(sample.references),
                            "meta": dict(sample.meta),
                            **prediction.values,
                        }
                        writer.write(record, prediction.picture)
                writer.flush()
            bar.update(len(batch))
    state.wait_for_everyone()


def _report(
    checkpoint: EvaluatedCheckpoint,
    task: Task,
    directory: PredictionDirectory,
    settings: dict[str, Any],
    num_shown: int,
) -> None:
    samples = task.data.samples
    records = directory.merge([samples[index].id for index in range(len(samples))])
    measurements = task.score(checkpoint, records, directory.path)
    report = {
        "task": task.name,
        "data": public_name(task.data.name),
        "split": task.data.split,
        "num_samples": len(records),
        "metrics": {name: measurement.to_dict() for name, measurement in measurements.items()},
        "checkpoint": public_name(checkpoint.name),
        "options": without_paths(task.options),
        "settings": without_paths(settings),
        "versions": library_versions(),
    }
    write_json(directory.path / METRICS, report)
    shown = [task.show(samples[i], records[i], directory.path) for i in range(min(num_shown, len(records)))]
    write_samples_page(directory.path, f"{task.name}: first {len(shown)} of {len(records)} samples", shown)


__all__ = ["METRICS", "evaluate"]
