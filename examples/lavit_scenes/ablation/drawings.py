"""Has the trained checkpoint draw with a scale of guidance, and checks its drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavit_hf import LavitTextToImagePipeline
from lavit_hf.evaluation import TASKS, EvaluatedCheckpoint, evaluate, read_data

_PARTS = ("background", "color", "shape", "fully_right")


def measure_drawings(checkpoint: str, scale: float, num_drawings: int, output_dir: Path) -> dict[str, Any]:
    """Shares of drawings of new scenes that are right, by `lavit evaluate`'s own means."""
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    data = read_data("scenes", task="text-to-image", split="validation", num_samples=num_drawings)
    task = TASKS["text-to-image"](data, {"guidance_scale": scale, "num_inference_steps": 20}, 0)
    evaluated = EvaluatedCheckpoint(checkpoint, pipeline.model, pipeline.processor, lambda decoder: pipeline)
    (result,) = evaluate(evaluated, [task], output_dir, progress=False)["results"]
    return {part: result["metrics"][part] for part in _PARTS}
