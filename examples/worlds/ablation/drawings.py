"""Has the trained checkpoint draw and read with one thing changed, by `lavit evaluate`'s own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavit_hf import LavitTextToImagePipeline
from lavit_hf.data.worlds import World
from lavit_hf.evaluation import EvaluatedCheckpoint, EvaluationSettings, build_tasks, evaluate

from .selection import blind

_STEPS = 20


def measure_drawings(
    checkpoint: str, world: World, scale: float, num_drawings: int, output_dir: Path
) -> dict[str, Any]:
    """Shares of drawings of new scenes that are right, with a scale of guidance."""
    options = {"guidance_scale": scale, "num_inference_steps": _STEPS}
    return _measure(_load(checkpoint), world, "text-to-image", num_drawings, options, output_dir)


def measure_patches(
    checkpoint: str,
    world: World,
    selection: str,
    num_tokens: int,
    num_scenes: int,
    num_drawings: int,
    output_dir: Path,
) -> dict[str, Any]:
    """Shares of captions and rebuilt pictures of new scenes that are right, from so many patches, chosen so."""
    evaluated = _load(checkpoint)
    blind(evaluated.model.visual_tokenizer, selection)
    torch.manual_seed(0)  # for patches that are kept by chance
    budget = {"num_image_tokens": num_tokens}
    captions = _measure(evaluated, world, "caption", num_scenes, budget, output_dir / "captions")
    steps = {"num_inference_steps": _STEPS}
    rebuilt = _measure(evaluated, world, "reconstruction", num_drawings, budget | steps, output_dir / "rebuilt")
    return {"captions": captions["fully_right"]} | {f"rebuilt {name}": value for name, value in rebuilt.items()}


def usual_budget(checkpoint: str, world: World, num_scenes: int) -> int:
    """How many patches of new scenes the checkpoint keeps on average, by its own choice."""
    evaluated = _load(checkpoint)
    kept = []
    pictures = [world.render(world.sample_scene(world.splits[1], 0, index)) for index in range(num_scenes)]
    for start in range(0, num_scenes, 100):
        inputs = evaluated.processor.image_processor(pictures[start : start + 100], return_tensors="pt")
        with torch.no_grad():
            kept += evaluated.model.visual_tokenizer.embed(inputs["pixel_values"]).keep_mask.sum(dim=1).tolist()
    return round(sum(kept) / len(kept))


def _load(checkpoint: str) -> EvaluatedCheckpoint:
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return EvaluatedCheckpoint(checkpoint, pipeline.model, pipeline.processor, lambda decoder: pipeline)


def _measure(
    evaluated: EvaluatedCheckpoint,
    world: World,
    task: str,
    num_samples: int,
    options: dict[str, Any],
    output_dir: Path,
) -> dict[str, Any]:
    settings = EvaluationSettings(
        world.name,
        tasks=[task],
        splits=[world.splits[1]],
        num_samples=num_samples,
        num_drawings=num_samples,
        options=options,
    )
    (result,) = evaluate(evaluated, build_tasks(settings), output_dir, progress=False)["results"]
    return {name: value for name, value in result["metrics"].items() if "/" not in name}  # of all, not of some
