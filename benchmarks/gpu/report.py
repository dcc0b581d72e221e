"""Results as a file, a table and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timing import Timing

from lavit_hf.utils.atomic_files import write_json
from lavit_hf.utils.json_files import read_json_object

RESULTS = "results.json"


@dataclass
class Result:
    """A number, and what it is to be judged by.

    Attributes:
        what: What was measured.
        value: The number.
        unit: Its unit; less is better if this is a time or a size.
        timing: The calls that it comes from.
        floor: What the device could do, in the same unit; `None` where nothing says so.
        floor_of: How that was found.
        peers: What others reach in the same process, in the same unit.
        bar: What it should reach, in words.
        is_met: Whether it does; `None` without a bar.
        notes: What else to know.
    """

    what: str
    value: float
    unit: str
    timing: Timing | None = None
    floor: float | None = None
    floor_of: str = ""
    peers: dict[str, float] = field(default_factory=dict)
    bar: str = ""
    is_met: bool | None = None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def is_rate(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def share(self) -> float | None:
        """How much of what the device could do it reaches."""
        return None if self.floor is None else compare(self.value, self.floor, self.unit)

    def require(self, bar: str, is_met: bool) -> Result:
        """Adds what it should reach."""
        self.bar, self.is_met = bar, bool(is_met)
        return self

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass
class NotRun:
    """What cannot be measured here.

    Attributes:
        what: What was to be measured.
        why: What is missing.
    """

    what: str
    why: str


def compare(value: float, other: float, unit: str) -> float:
    """How much better a number is than another one: above 1, it is."""
    return value / other if unit.endswith("/s") else other / value


def read_results(folder: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured before, unless that was elsewhere or with other versions."""
    path = folder / RESULTS
    if path.is_file():
        found = read_json_object(path)
        if {name: found.get(name) for name in environment} == environment:
            return found
    return {**environment, "rows": {}}


def write_results(folder: Path, found: dict[str, Any]) -> None:
    write_json(folder / RESULTS, found)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(found: dict[str, Any]) -> str:
    """The rows as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['size']}, {found['dtype']}, {found['device']}; {versions}",
        "",
        "| What | Measured | Of the floor | Peers | Should be | Warm-up | Memory | Notes |",
        "|---|--:|--:|---|---|--:|--:|---|",
    ]
    for name, row in found["rows"].items():
        for result in row["results"]:
            share = "" if result["share"] is None else f"{result['share']:.0%} of {_number(result['floor'])}"
            peers = "; ".join(
                f"{peer}: {_number(value)} ({compare(result['value'], value, result['unit']):.2f}x)"
                for peer, value in result["peers"].items()
            )
            bar = result["bar"] + {None: "", True: ": yes", False: ": **no**"}[result["is_met"]]
            timing = result["timing"] or {}
            warm_up = f"{sum(timing['warm_up']):.1f} s" if timing.get("warm_up") else ""
            memory = f"{timing['memory'] / 2**30:.1f} GiB" if timing.get("memory") else ""
            measured = f"{_number(result['value'])} {result['unit']}"
            notes = "; ".join(f"{note.replace('_', ' ')} {_number(value)}" for note, value in result["notes"].items())
            cells = (result["what"], measured, share, peers, bar, warm_up, memory, notes)
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {one['what']} | not run: {one['why']} | | | | | | |" for one in row.get("not_run", [])]
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | | |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """How much of the floor each row reaches, and how it compares with its peers."""
    from matplotlib.figure import Figure

    results = [result for row in found["rows"].values() for result in row["results"]]
    height = 1.5 + 0.42 * max(len(results), 1)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, result in enumerate(results):
        value = f"{_number(result['value'])} {result['unit']}"
        left.barh(place, result["share"] or 0, color="tab:blue", height=0.6)
        left.text(0.01, place, value, va="center", fontsize=8)
        for number, (peer, other) in enumerate(result["peers"].items()):
            times = compare(result["value"], other, result["unit"])
            right.plot(times, place, "o^sv"[number % 4], color="tab:orange", markersize=6)
            right.annotate(peer, (times, place), (4, 4), textcoords="offset points", fontsize=6)
    left.set_yticks(range(len(results)), [result["what"] for result in results], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel("share of the floor")
    right.axvline(1, color="gray", linewidth=0.8)
    right.set_xlabel("times as fast as peers")
    versions = found["versions"]
    figure.suptitle(
        f"lavit-hf {versions['lavit-hf']}, {found['size']}, {found['dtype']}, {found['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, diffusers {versions['diffusers']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
