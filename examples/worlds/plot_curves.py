"""Plots how the stages of a recipe learned, and saves the numbers behind it.

    python examples/worlds/plot_curves.py --trained out/lavit-scenes --output_dir examples/lavit_scenes/results

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lavit_hf.training import exit_on_write_errors

_SHOWN = 6  # plots of a stage
_LEFT_OUT = re.compile(r"step|epoch|total_flos|grad_norm|learning_rate|train_.*|.*_(runtime|per_second)")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a stage logged."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def names_of(log: list[dict[str, Any]]) -> list[str]:
    """What a stage logged that tells how it learned."""
    found = dict.fromkeys(name for line in log for name in line)
    return [name for name in found if not _LEFT_OUT.fullmatch(name)]


def main(arguments: list[str] | None = None) -> None:
    """Writes `curves.png` and `logs.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="directory of train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the results go")
    args = parser.parse_args(arguments)
    states = sorted(args.trained.glob("*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        parser.error(f"{args.trained} holds no stage that logged anything")
    logs = {path.parent.name: read_log(path.parent) for path in states}
    curves = {stage: names_of(log)[:_SHOWN] for stage, log in logs.items()}
    columns = max(map(len, curves.values()))
    figure, axes = plt.subplots(len(curves), columns, figsize=(3.2 * columns, 2.2 * len(curves)), squeeze=False)
    for row, (stage, names) in zip(axes, curves.items(), strict=True):
        for axis, name in zip(row, names, strict=False):
            points = [(line["step"], float(line[name])) for line in logs[stage] if name in line]
            axis.plot(*zip(*points, strict=True), linewidth=1)
            axis.set_title(f"{stage}: {name}", fontsize=8)
            axis.tick_params(labelsize=7)
        for axis in row[len(names) :]:
            axis.axis("off")
    figure.tight_layout()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_dir / "curves.png", dpi=100)
    (args.output_dir / "logs.json").write_text(json.dumps(logs, indent=None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
