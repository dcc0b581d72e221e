"""Metrics as text, from what is in `metrics.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.public_text import one_line


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """A table per task: name, value, 95 % interval, and how many of what it was measured on.

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
    return "\n".join([title, *lines])


def _format_row(name: str, measurement: Mapping[str, Any]) -> tuple[str, str, str, str]:
    is_share = measurement["is_share"]

    def write(value: float) -> str:
        return f"{100 * value:.1f}" if is_share else f"{value:.3f}"

    value, interval = measurement["value"], measurement["interval"]
    unit = " %" if is_share and value is not None else ""
    between = "" if interval is None else f"[{write(interval[0])}, {write(interval[1])}]"
    count = one_line(f"{measurement['n']} {measurement['unit']}")
    return one_line(name), "-" if value is None else write(value) + unit, between, count


__all__ = ["format_metrics"]
