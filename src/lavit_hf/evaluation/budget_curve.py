"""Quality against budgets: one evaluation with several numbers of tokens per image, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.atomic_files import complete_file, write_json
from ..utils.distributed import process_state
from ..utils.public_text import public_name
from .checkpoint import EvaluatedCheckpoint
from .evaluator import EvaluationSettings, build_tasks, evaluate, format_value, library_versions
from .tasks import BUDGET, TASKS, VISUAL_MODE

CURVE = "curve.json"
PICTURE = "curve.png"
OWN = "own"
"""In the place of a budget: the selector decides."""


def evaluate_budgets(
    checkpoint: EvaluatedCheckpoint,
    settings: EvaluationSettings,
    budgets: Sequence[int],
    output: str | Path,
    *,
    batch_size: int = 32,
    num_shown: int = 36,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a checkpoint with every budget, and with the number of tokens that its selector chooses.

    Args:
        checkpoint: The checkpoint.
        settings: What to evaluate on. Of its tasks those take part that see images.
        budgets: Tokens per image.
        output: Directory to write: `tokens-K/` for every budget K and `tokens-own/`, as [`evaluate`] writes them,
            `curve.json` with the numbers of all, and `curve.png`.
        batch_size: As for [`evaluate`], and so are the others.
        num_shown: Samples on every page.
        progress: Whether to show bars.

    Returns:
        The content of `curve.json`, in all processes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no budgets, an image cannot become so many tokens, or no task sees images.
    """
    from matplotlib.figure import Figure

    num_patches = checkpoint.model.config.visual_tokenizer_config.num_patches
    if not budgets or not all(1 <= budget <= num_patches for budget in budgets):
        raise ValueError(f"Budgets must be numbers of tokens from 1 to {num_patches}; got {list(budgets)}.")
    names = [name for name in settings.tasks if name not in TASKS or TASKS[name].sees_images]
    if not names:
        raise ValueError(f"None of the tasks ({', '.join(settings.tasks)}) sees images, so none has a budget.")
    output = Path(output)
    points = []
    for budget in (*sorted(set(budgets)), None):
        options = {**settings.options, BUDGET: budget}
        tasks = build_tasks(replace(settings, tasks=names, options=options))
        folder = output / f"tokens-{OWN if budget is None else budget}"
        metrics = evaluate(checkpoint, tasks, folder, batch_size=batch_size, num_shown=num_shown, progress=progress)
        points.append({"num_image_tokens": budget, "cost": _cost(checkpoint, budget), "results": metrics["results"]})
    curve = {"checkpoint": public_name(checkpoint.name), "versions": library_versions(), "points": points}
    state = process_state(checkpoint.model.device)
    if state.is_main_process:
        write_json(output / CURVE, curve)
        figure = Figure(figsize=(5 * len(points[0]["results"]), 4), layout="constrained")
        _draw(figure, points)
        with complete_file(output / PICTURE) as file:
            figure.savefig(file, format="png", dpi=100)
    state.wait_for_everyone()
    return curve


def _cost(checkpoint: EvaluatedCheckpoint, budget: int | None) -> dict[str, float] | None:
    """What reading one image costs the language model, computed from sizes: 2 FLOP per weight and position."""
    if budget is None:
        return None
    decoder = checkpoint.model.model.language_model
    embeddings = sum(value.numel() for value in decoder.get_input_embeddings().parameters())
    weights = sum(value.numel() for value in decoder.parameters()) - embeddings
    return {"positions": budget + 2, "language_model_gflop": 2 * weights * (budget + 2) / 1e9}


def shown_metrics(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of a task that a curve shows: shares and scores of the whole, not of kinds or of tokens."""
    metrics = result["metrics"].items()
    return {
        name: one for name, one in metrics if "/" not in name and name != "live_codes" and one["value"] is not None
    }


def mean_tokens(point: Mapping[str, Any], index: int) -> float | None:
    """Tokens per image of a point; where the selector decided, as counted in the predictions of a task."""
    if point["num_image_tokens"] is not None:
        return float(point["num_image_tokens"])
    results = [point["results"][index], *point["results"]]
    has_codes = results[0]["task"] == "reconstruction" or results[0]["options"].get(VISUAL_MODE) == "discrete"
    branches = ("discrete", "continuous") if has_codes else ("continuous", "discrete")
    names = [f"tokens/{branch}/mean" for branch in branches]
    found = (result["metrics"][name]["value"] for result in results for name in names if name in result["metrics"])
    return next(found, None)


def format_curve(curve: Mapping[str, Any]) -> str:
    """Writes a table per task: a row for every metric, a column for every budget.

    Args:
        curve: The content of `curve.json`.
    """
    points = curve["points"]
    heads = [OWN if point["num_image_tokens"] is None else str(point["num_image_tokens"]) for point in points]
    tables = []
    for index, first in enumerate(points[0]["results"]):
        rows = [("tokens", *heads)]
        for name in shown_metrics(first):
            values = [point["results"][index]["metrics"][name] for point in points]
            rows.append((name, *(format_value(value) for value in values)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads) + 1)]
        lines = [
            "  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, len(row)))])
            for row in rows
        ]
        title = ", ".join(filter(None, (first["task"], first["split"])))
        tables.append("\n".join([f"{title} ({first['num_samples']} samples)", *lines]))
    return "\n\n".join(tables)


def _draw(figure: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """One plot per task and split: lines over budgets, and dots where the selector decided."""
    axes = figure.subplots(1, len(points[0]["results"]), squeeze=False)[0]
    for index, axis in enumerate(axes):
        first = points[0]["results"][index]
        for name in shown_metrics(first):
            found = [(mean_tokens(point, index), shown_metrics(point["results"][index]).get(name)) for point in points]
            own_tokens, own = found[-1]
            line = [(tokens, one) for tokens, one in found[:-1] if one is not None]
            tokens = [tokens for tokens, _ in line]
            (drawn,) = axis.plot(tokens, [one["value"] for _, one in line], marker="o", ms=3, label=name)
            if all(one["interval"] for _, one in line):
                low, high = ([one["interval"][side] for _, one in line] for side in (0, 1))
                axis.fill_between(tokens, low, high, alpha=0.15, color=drawn.get_color())
            if own_tokens is not None and own is not None:
                axis.plot([own_tokens], [own["value"]], marker="*", ms=10, color=drawn.get_color())
        axis.set_xscale("log", base=2)
        budgets = [point["num_image_tokens"] for point in points[:-1]]
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.set_xlabel("tokens per image (star: the selector decides)")
        axis.set_title(", ".join(filter(None, (first["task"], first["split"]))))
        axis.legend(fontsize=7)


__all__ = ["CURVE", "OWN", "PICTURE", "evaluate_budgets", "format_curve", "mean_tokens", "shown_metrics"]
