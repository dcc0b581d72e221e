"""`lavit plot`: draws how trainings went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .checks import check_picture_output, check_source

_STATE = "trainer_state.json"
# What `Trainer` logs beside metrics.
_NO_METRICS = ("step", "epoch", "total_flos", "num_input_tokens_seen")
_NO_METRIC_ENDS = ("_runtime", "_per_second")
_COLUMNS = 4


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Directory that a training wrote; several are compared.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PICTURE", help="File to write, such as a PNG.")
    ] = Path("out/curves.png"),
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="What to draw, with or without eval_; may be given several times.", show_default="all"
        ),
    ] = None,
) -> None:
    """Draw the curves of trainings: the loss, the learning rate, and what else they logged.

    Numbers of evaluations are drawn into the plot of what they are called without eval_. It works while a training
    runs, from its last checkpoint.

    \b
    Examples:
      lavit plot out/tokenizer
      lavit plot out/lm-a out/lm-b --metric loss -o compared.png
    """
    for run in runs:
        check_source(run, "RUN")
    check_picture_output(output)
    logs = {_name(run, runs): _read_log(run) for run in runs}
    names = (name for log in logs.values() for row in log for name in row if name != "step")
    found = list(dict.fromkeys(map(_title, names)))
    if unknown := [name for name in metric or [] if _title(name) not in found]:
        raise ValueError(f"{', '.join(unknown)}: nobody logged that. There are {', '.join(found)}.")
    _save_figure(logs, list(dict.fromkeys(map(_title, metric or found))), output)
    print(f"Wrote {output}")


def _name(run: Path, runs: Sequence[Path]) -> str:
    """A run in the legend: its directory, with as much before it as tells it from others."""
    parts = run.resolve().parts
    others = {other.resolve().parts for other in runs} - {parts}
    length = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return "/".join(parts[-length:])


def _read_log(run: Path) -> list[dict[str, float]]:
    """The metrics that `Trainer` logged, each row with its step.

    Raises:
        ValueError: There are none.
    """
    checkpoints = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    # What is in the directory itself was written in the end; a run that goes on since has checkpoints of later steps.
    last = _step_of(run / _STATE)
    later = [path for path in newest_first if last is None or int(path.name.rpartition("-")[2]) > last]
    path = next((folder / _STATE for folder in (*later, run, *newest_first) if (folder / _STATE).is_file()), None)
    if path is None:
        raise ValueError(f"{run} holds no {_STATE}, neither itself nor in a checkpoint: no training has saved there.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        log = [_metrics(row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds no log of a training.") from error
    if not any(len(row) > 1 for row in log):
        raise ValueError(f"{path} has no metrics: nothing was logged yet (--logging_steps says when).")
    return log


def _step_of(state: Path) -> int | None:
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # `_read_log` says what is wrong with it
    return step if isinstance(step, int) else None


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    metrics = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float))
        and name not in _NO_METRICS
        and not name.startswith("train_")  # of the whole run
        and not name.endswith(_NO_METRIC_ENDS)
    }
    return {"step": float(row["step"]), **metrics}


def _title(name: str) -> str:
    return name.removeprefix("eval_")


def _save_figure(logs: Mapping[str, Sequence[Mapping[str, float]]], titles: Sequence[str], output: Path) -> None:
    """One plot per metric."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves need matplotlib: pip install 'lavit-hf[evaluation]'") from error
    from PIL import Image

    from .pictures import save_picture

    columns = min(len(titles), _COLUMNS)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, title in zip(axes, titles, strict=False):
        for number, (run, log) in enumerate(logs.items()):
            for name, style in ((title, "-"), (f"eval_{title}", "o-")):
                points = [(row["step"], row[name]) for row in log if name in row]
                if points:
                    label = f"{run} ({'evaluation' if name != title else 'training'})"
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", lw=1, ms=3, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    for axis in axes[len(titles) :]:
        axis.axis("off")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    save_picture(Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB"), output)
