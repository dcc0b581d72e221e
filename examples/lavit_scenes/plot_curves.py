"""Plots how the stages of lavit-scenes learned, and saves the numbers behind it.

    python examples/lavit_scenes/plot_curves.py --trained out/lavit-scenes --output_dir examples/lavit_scenes/results

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lavit_hf.training import exit_on_write_errors

# Of each stage, the numbers to show.
CURVES = {
    "vision_encoder": ["loss", "eval_validation_shape", "eval_held_out_shape", "eval_held_out_color"],
    "autoencoder": ["absolute_error", "eval_psnr"],
    "tokenizer": ["cosine", "argmax_keep_rate", "perplexity"],
    "lavit_drawing": ["loss"],
    "lavit": ["loss"],
    "pixel_decoder": ["loss", "eval_loss"],
}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a stage logged."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def main(arguments: list[str] | None = None) -> None:
    """Writes `curves.png` and `logs.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="directory of train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the results go")
    args = parser.parse_args(arguments)
    logs = {stage: read_log(args.trained / stage) for stage in CURVES}
    columns = max(map(len, CURVES.values()))
    figure, axes = plt.subplots(len(CURVES), columns, figsize=(3.2 * columns, 2.2 * len(CURVES)), squeeze=False)
    for row, (stage, names) in zip(axes, CURVES.items(), strict=True):
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
