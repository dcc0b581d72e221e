"""Evaluates a checkpoint: from settings to tasks, to predictions by all processes, to `metrics.json`, to text."""

from __future__ import annotations

import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..utils.atomic_files import write_json
from ..utils.distributed import process_state, take_from_first_process
from ..utils.json_files import read_json_object
from ..utils.progress import progress_bar
from ..utils.public_text import one_line, public_name, without_paths
from .benchmarks import BENCHMARKS
from .checkpoint import EvaluatedCheckpoint
from .data import read_data
from .data.samples import Columns, EvaluationSample, UnfitDataError
from .duration import estimate_hours, format_hours
from .original_tasks import LAVIT, ORIGINAL_TASKS, PLAIN, PROTOCOLS, describe_protocol
from .predictions import PredictionDirectory, write_samples_page
from .tasks import TASKS, Task, tasks_for

METRICS = "metrics.json"
_PACKAGES = (
    "lavit-hf",
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "torchmetrics",
    "spacy",
    "en-core-web-sm",
    "pycocoevalcap",
)


@dataclass
class EvaluationSettings:
    """What to evaluate a checkpoint on, and how.

    Attributes:
        data: What the samples are read from; this and what is not described here is as for [`read_data`].
        tasks: Names of tasks; none for all that the data fit.
        splits: Every task is evaluated on each of them; by default on the one that `read_data` chooses.
        num_samples: How many images or questions at most, the first ones.
        num_drawings: The same for tasks that draw; `num_samples` by default.
        images: Folder of a file's images.
        annotations: The file with the answers to questions.
        config: Configuration of a dataset.
        revision: Revision of a dataset.
        columns: Columns of a dataset.
        seed: All random choices follow from it.
        options: Options of the tasks by name; `None` leaves one to the task. Each task takes those that it has.
        benchmark: Name of the benchmark of the paper that the data are, as [`benchmark_settings`] sets it.
        protocol: `"lavit"` for the protocol of its published number.
        only_fitting: Whether tasks that the data do not fit are left out instead of refused; by default if none are
            named.
    """

    data: str
    tasks: Sequence[str] = ()
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
    benchmark: str | None = None
    protocol: str = PLAIN
    only_fitting: bool | None = None

    def __post_init__(self) -> None:
        if self.only_fitting is None:
            self.only_fitting = not self.tasks
        self.tasks = self.tasks or tasks_for(self.data)

    def num_samples_of(self, task: str) -> int | None:
        """How many samples at most the task of a name is given."""
        has_own = TASKS[task].draws and self.num_drawings is not None
        return self.num_drawings if has_own else self.num_samples


def benchmark_settings(
    name: str,
    root: str | Path,
    *,
    protocol: str = LAVIT,
    num_samples: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> EvaluationSettings:
    """Finds the files of a benchmark of the paper.

    Args:
        name: One of `BENCHMARKS`.
        root: The directory that its files are in.
        protocol: `"lavit"` is that behind the published numbers; `"plain"` puts questions as they are written, and
            compares as the official evaluations do.
        num_samples: How many images or questions, if not all.
        seed: All random choices follow from it.
        options: Options of the task that are not the protocol's; each is a deviation that the result names.

    Returns:
        The settings for [`build_tasks`].

    Raises:
        ValueError: There is no such benchmark or protocol, or files are missing.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}.")
    benchmark = BENCHMARKS[name]
    files = benchmark.find(root)
    return EvaluationSettings(
        str(files["data"]),
        tasks=(benchmark.task,),
        splits=() if benchmark.split is None else (benchmark.split,),
        num_samples=benchmark.num_samples if num_samples is None else num_samples,
        images=files["images"],
        annotations=files.get("annotations"),
        seed=seed,
        options=options or {},
        protocol=protocol,
        benchmark=name,
    )


def build_tasks(settings: EvaluationSettings) -> list[Task]:
    """Reads the data of every task and split.

    Args:
        settings: What to evaluate on, and how.

    Returns:
        The tasks for [`evaluate`], each on every split; without names, those that the data fit.

    Raises:
        ValueError: There is no task of a name, none has a use for an option, or the data do not exist or do not fit
            a task that was named.
    """
    if unknown := [name for name in settings.tasks if name not in TASKS]:
        raise ValueError(f"There is no task {unknown[0]!r}; there are {', '.join(TASKS)}.")
    splits: list[str | None] = list(dict.fromkeys(settings.splits)) or [None]
    tasks: list[Task] = []
    unfit: list[str] = []
    for name in dict.fromkeys(settings.tasks):
        for split in splits:
            try:
                tasks.append(_build_task(settings, name, split))
            except UnfitDataError as error:
                if not settings.only_fitting:
                    raise
                unfit.append(str(error))
    if not tasks:
        raise UnfitDataError("\n".join([f"{settings.data} fits none of the tasks:", *dict.fromkeys(unfit)]))
    known = {option for task in tasks for option in task.options}
    for option, value in settings.options.items():
        if value is not None and option not in known:
            raise ValueError(f"None of the tasks has a use for {option}={value}.")
    return tasks


def _build_task(settings: EvaluationSettings, name: str, split: str | None) -> Task:
    data = read_data(
        settings.data,
        name,
        split=split,
        num_samples=settings.num_samples_of(name),
        images=settings.images,
        annotations=settings.annotations,
        columns=settings.columns,
        config=settings.config,
        revision=settings.revision,
    )
    if settings.benchmark is not None:
        data = replace(data, benchmark=BENCHMARKS[settings.benchmark])
    task = ORIGINAL_TASKS[name] if settings.protocol == LAVIT else TASKS[name]
    own = task.default_options(data)
    return task(data, {option: value for option, value in settings.options.items() if option in own}, settings.seed)


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
        checkpoint: The checkpoint that is evaluated.
        tasks: The tasks that it is given, one after another.
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
    """Returns what must not change between two runs into the same directory."""
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
    order = task.order()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # Shared are those that something is missing of, by what the first process has read: were the lists of two
    # processes not the same, a batch could be nobody's. They are computed as a whole, to stay the same batches.
    lacking = torch.tensor(
        [not finished or any(samples[index].id not in finished for index in batch) for batch in batches]
    )
    unfinished = take_from_first_process(lacking.to(state.device, torch.uint8)).nonzero()[:, 0].tolist()
    if not unfinished:
        return
    mine = [batches[number] for number in unfinished[state.process_index :: state.num_processes]]
    wanted = ([samples[index] for index in batch] for batch in mine)
    progress = progress and state.is_main_process
    if progress and task.data.benchmark is not None:
        hours = estimate_hours(checkpoint, task, state.num_processes) * (1 - len(finished) / len(samples))
        print(
            f"{task.data.benchmark.name}: {len(samples)} samples; estimated time: {format_hours(hours)}",
            file=sys.stderr,
        )
    bar = progress_bar(task.name, len(samples), progress, unit="sample")
    with bar, directory.writer(state.process_index) as writer:
        bar.update(len(finished))
        for batch in _with_images(wanted) if task.sees_images else wanted:
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
            bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))  # others are about as fast
    state.wait_for_everyone()


_DECODERS = 4  # threads that decode images


def _with_images(batches: Iterable[list[EvaluationSample]]) -> Iterator[list[EvaluationSample]]:
    """The same samples with their images read: those of the next batch while one is computed."""
    waiting: deque[list[Future[EvaluationSample]]] = deque()
    pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")
    try:
        for batch in batches:
            waiting.append([pool.submit(_with_image, sample) for sample in batch])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _with_image(sample: EvaluationSample) -> EvaluationSample:
    return replace(sample, image=sample.open_image())


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
    if task.data.benchmark is not None:
        report["protocol"] = describe_protocol(task, checkpoint)
    write_json(directory.path / METRICS, report)
    shown = [task.show(samples[i], records[i], directory.path) for i in range(min(num_shown, len(records)))]
    write_samples_page(directory.path, f"{task.name}: first {len(shown)} of {len(records)} samples", shown)


def library_versions() -> dict[str, str]:
    """Lists the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Writes a table per task: name, value, 95 % interval, and how many of what it was measured on.

    Args:
        metrics: The content of the `metrics.json` of all tasks.
    """
    return "\n\n".join(_format_result(result) for result in metrics["results"])


def _format_result(result: Mapping[str, Any]) -> str:
    split = f", {result['split']}" if result["split"] else ""
    rows = [_format_row(name, measurement) for name, measurement in result["metrics"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows
    ]
    title = one_line(f"{result['task']} ({result['data']}{split}, {result['num_samples']} samples)")
    return "\n".join([title, *lines, *_format_protocol(result)])


def _format_protocol(result: Mapping[str, Any]) -> list[str]:
    """The number of a benchmark beside those that were published, and what was done in another way."""
    protocol = result.get("protocol")
    if protocol is None:
        return []
    measurement, scale = result["metrics"].get(protocol["metric"]), protocol["scale"]
    here = "not measured"
    if measurement is not None:
        between = measurement["interval"] and ", ".join(f"{scale * end:.1f}" for end in measurement["interval"])
        here = f"{scale * measurement['value']:.1f}" + (f" [{between}]" if between else "")
    published = ", ".join(f"{version} {value}" for version, value in protocol["published"].items())
    lines = [f"  {protocol['benchmark']} by the protocol {protocol['name']}: {here}; published: {published}"]
    return lines + [f"  - {deviation}" for deviation in protocol["deviations"]]


def _format_row(name: str, measurement: Mapping[str, Any]) -> tuple[str, str, str, str]:
    low_and_high = measurement["interval"]
    between = "" if low_and_high is None else f"[{', '.join(_write(one, measurement) for one in low_and_high)}]"
    count = one_line(f"{measurement['n']} {measurement['unit']}")
    return one_line(name), format_value(measurement), between, count


def format_value(measurement: Mapping[str, Any]) -> str:
    """Writes the value of a measurement: a share in percent, any other with three places."""
    value = measurement["value"]
    if value is None:
        return "-"
    return _write(value, measurement) + (" %" if measurement["is_share"] else "")


def _write(value: float, measurement: Mapping[str, Any]) -> str:
    return f"{100 * value:.1f}" if measurement["is_share"] else f"{value:.3f}"


__all__ = [
    "METRICS",
    "EvaluationSettings",
    "benchmark_settings",
    "build_tasks",
    "evaluate",
    "format_metrics",
    "format_value",
    "library_versions",
]
