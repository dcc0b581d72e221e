"""Has the trained checkpoint draw with a scale of guidance, and checks its drawings."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lavit_hf.cli.draw import load_pipeline
from lavit_hf.cli.loading import load
from lavit_hf.evaluation import TASKS, EvaluatedCheckpoint, evaluate, read_data

_PARTS = ("background", "color", "shape", "fully_right")


def measure_drawings(checkpoint: str, scale: float, num_drawings: int, output_dir: Path) -> dict[str, Any]:
    """Shares of drawings of new scenes that are right, by `lavit evaluate`'s own means."""
    lavit = load(checkpoint, "cpu", "auto")
    data = read_data("scenes", task="text-to-image", split="validation", num_samples=num_drawings)
    task = TASKS["text-to-image"](data, {"guidance_scale": scale, "num_inference_steps": 20}, 0)
    evaluated = EvaluatedCheckpoint(checkpoint, lavit.model, lavit.processor, functools.partial(load_pipeline, lavit))
    (result,) = evaluate(evaluated, [task], output_dir, progress=False)["results"]
    return {part: result["metrics"][part] for part in _PARTS}
