"""`lavit plan-training`: what a training will take, before it is started."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import check_source

if TYPE_CHECKING:
    from lavit_hf.training import TrainingPlan

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


class Stage(StrEnum):
    """What is trained."""

    stage1 = "stage1"
    stage2 = "stage2"
    stage3 = "stage3"
    lora = "lora"


class GpuName(StrEnum):
    """GPUs whose peak and memory are known."""

    a100 = "a100"
    a100_40gb = "a100-40gb"
    h100 = "h100"
    h200 = "h200"
    l40s = "l40s"
    rtx4090 = "rtx4090"


def plan_training(
    stage: Annotated[Stage, typer.Argument(help="What to train.", show_default=False)],
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="Pairs or pictures to train on: 500k, 10M, 1.5B.",
            show_default="those of max_steps of --config",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs, of nodes of 8.")] = 8,
    gpu: Annotated[GpuName, typer.Option(help="Which ones.")] = GpuName.h100,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Recipe, as the training scripts take it.", show_default="that for 7B"),
    ] = None,
    vision_model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Vision encoder, or its name on the Hub.", show_default="LaVIT's")
    ] = None,
    text_model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Language model, or its name.", show_default="LaVIT's, 7B")
    ] = None,
    shard: Annotated[
        bool | None, typer.Option("--shard/--no-shard", help="Shard weights (FSDP2).", show_default="stage 2 only")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the text of a pair.")] = 23,
    peak_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the GPU's peak that is reached.", show_default="as measured on one H200"
        ),
    ] = None,
    price: Annotated[float, typer.Option(min=0, help="Dollars for an hour of one GPU.")] = 2.5,
) -> None:
    """Plan a training: time, memory per GPU, tokens per second and cost, computed without weights.

    Assumptions are printed, and warnings where a plan does not fit. docs/scale.md says what was measured.

    \b
    Examples:
      lavit plan-training stage2 --gpus 8 --gpu h100 --pairs 10M
      lavit plan-training stage1 --config examples/lavit_7b/stage1.yaml
      lavit plan-training lora --gpus 1 --gpu rtx4090 --pairs 100k --config examples/lavit_7b/qlora.yaml
    """
    num_samples = None if pairs is None else read_number(pairs)
    if num_samples is None and config is None:
        raise ValueError("--pairs says how many pairs to train on, or max_steps of a --config.")
    if config is not None:
        check_source(config, "--config", is_file=True)
    for model, option in ((vision_model, "--vision-model"), (text_model, "--text-model")):
        if model is not None:
            check_source(model, option, or_repository=True)

    from transformers import AutoConfig
    from transformers.utils import logging

    from lavit_hf.training import PEAK_SHARE, read_recipe
    from lavit_hf.training import plan_training as plan

    logging.set_verbosity_error()
    configs = [None if name is None else AutoConfig.from_pretrained(name) for name in (vision_model, text_model)]
    result = plan(
        stage.value,
        num_samples,
        num_gpus=gpus,
        gpu=gpu.value,
        recipe=None if config is None else read_recipe(config),
        vision_config=configs[0],
        text_config=configs[1],
        shard=shard,
        text_tokens=text_tokens,
        peak_share=PEAK_SHARE if peak_share is None else peak_share,
        price_per_hour=price,
    )
    for line in describe(result):
        print(line)


def read_number(text: str) -> int:
    """A number of pairs, such as `10M`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    number = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if number < 1:
        raise ValueError(f"--pairs takes a number above 0, perhaps with k, M or B; got {text!r}.")
    return number


def describe(plan: TrainingPlan) -> list[str]:
    """The plan in lines."""
    gib = 2**30
    total, learned = plan.num_parameters
    noun = "pictures" if plan.stage in ("stage1", "stage3") else "pairs"
    where = "sharded" if plan.is_sharded else "a copy on each" if plan.num_gpus > 1 else "alone"
    parts = ", ".join(f"{name} {size / gib:.1f}" for name, size in plan.memory.items())
    return [
        f"{plan.stage}: {plan.num_samples:,} {noun} on {plan.num_gpus} x {plan.gpu} ({where})",
        f"  parameters  {total / 1e9:.2f} B, of which {learned / 1e9:.2f} B learn",
        f"  batch       {plan.batch_size} {noun}, {plan.updates:,} updates",
        f"  computing   {plan.tflops_per_sample:.2f} TFLOP for each of {plan.tokens_per_sample:.0f} tokens",
        f"  speed       {plan.samples_per_second:,.1f} {noun}/s, {plan.tokens_per_second:,.0f} tokens/s",
        f"  time        {_duration(plan.hours)} ({plan.gpu_hours:,.1f} GPU-hours)",
        f"  cost        ${plan.cost:,.0f}",
        f"  memory      {plan.total_memory / gib:.1f} GiB per GPU: {parts}",
        "Assumptions:",
        *(f"  - {line}" for line in plan.assumptions),
        *(f"Warning: {line}" for line in plan.warnings),
    ]


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
