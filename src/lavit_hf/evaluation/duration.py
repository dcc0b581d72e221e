"""How long a benchmark takes, estimated before it starts, from the sizes of networks and the speed of the device."""

from __future__ import annotations

import time
from typing import Any

import torch

from .checkpoint import EvaluatedCheckpoint
from .tasks import Task, TextToImageTask

_PROBE = {"cuda": 4096}  # side of the matrices that are multiplied to find out how fast a device is
_SMALL_PROBE = 512  # for other devices
_SHARE = 0.25  # of that speed, which generation reaches: it waits for memory, samples, and pads
_WORDS = 30  # tokens of a question with what stands around it
_DRAWN = 100  # codes of a drawn image, about
_UNET_FLOP = 800  # per weight of a Stable Diffusion 1.5 U-Net and step, at 512 x 512 pixels


def estimate_hours(checkpoint: EvaluatedCheckpoint, task: Task, num_processes: int = 1) -> float:
    """Estimates how long a task takes.

    Args:
        checkpoint: The checkpoint, on its device.
        task: The task; of those with pixels, only drawing is known.
        num_processes: How many share the work, each with such a device.

    Returns:
        Hours. Attention, scoring, and the VAE and CLIP of drawings are not in it, and images count with all their
        patches: take it for the order of magnitude. The progress bar knows more after some batches.
    """
    flop = len(task.data.samples) * flop_per_sample(checkpoint, task)
    speed = _SHARE * multiply_speed(checkpoint.model.device, checkpoint.model.dtype)
    return flop / speed / num_processes / 3600


def flop_per_sample(checkpoint: EvaluatedCheckpoint, task: Task) -> float:
    """Counts what one sample costs: 2 FLOP per weight and position that passes it.

    Args:
        checkpoint: The checkpoint.
        task: The task.

    Returns:
        FLOP, as [`estimate_hours`] says what is in it.
    """
    model = checkpoint.model
    language = _num_weights(model.model.language_model) - _num_weights(model.get_input_embeddings())
    head = _num_weights(model.get_output_embeddings())
    decoder = 2 * (language + head)
    if isinstance(task, TextToImageTask):
        pipeline = checkpoint.pipeline(task.options["decoder"])
        steps = task.options["num_inference_steps"]
        denoising = _UNET_FLOP * _num_weights(pipeline.unet) * steps
        return task.options["num_candidates"] * 2 * (decoder * _DRAWN + denoising)  # both halves of guidance
    patches = task.options["num_image_tokens"] or model.config.visual_tokenizer_config.num_patches
    seen = 2 * _num_weights(model.visual_tokenizer) * model.config.visual_tokenizer_config.num_patches
    written = task.options["num_beams"] * task.options["max_new_tokens"]
    return task.questions_per_sample * (seen + decoder * (patches + _WORDS + written))


def _num_weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def multiply_speed(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> float:
    """Measures how many FLOP per second a device makes when it multiplies large matrices.

    Args:
        device: The device.
        dtype: Of the matrices.
        repetitions: How often; the fastest counts.

    Returns:
        FLOP per second.
    """
    side = _PROBE.get(device.type, _SMALL_PROBE)
    matrix = torch.randn(side, side, device=device).to(dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    fastest = float("inf")
    for _ in range(repetitions + 1):  # the first prepares the device
        synchronize()
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def format_hours(hours: float) -> str:
    """Writes a duration as hours or minutes."""
    if hours < 1 / 60:
        return "less than a minute"
    return f"{hours:.1f} hours" if hours >= 1 else f"{round(60 * hours)} min"


__all__ = ["estimate_hours", "flop_per_sample", "format_hours", "multiply_speed"]
