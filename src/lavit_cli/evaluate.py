"""`lavit evaluate`: measures how well a checkpoint describes, answers, draws and reconstructs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .checks import check_data, check_output_directory, check_source, find_model
from .options import MAX_SEED, Decoder, Device, Dtype, RunDtype


class PaperBenchmark(StrEnum):
    """A published number."""

    coco = "coco"
    nocaps = "nocaps"
    flickr30k = "flickr30k"
    vqav2 = "vqav2"
    okvqa = "okvqa"
    gqa = "gqa"
    vizwiz = "vizwiz"
    coco_fid = "coco-fid"


class Protocol(StrEnum):
    """How a benchmark is asked and scored."""

    lavit = "lavit"
    plain = "plain"


class VisualMode(StrEnum):
    """How the language model reads a picture."""

    continuous = "continuous"
    discrete = "discrete"


class EvaluationTask(StrEnum):
    """What a checkpoint is asked to do."""

    caption = "caption"
    vqa = "vqa"
    text_to_image = "text-to-image"
    reconstruction = "reconstruction"
    editing = "editing"
    all = "all"


def _check_no_benchmark(
    task: list[EvaluationTask] | None, data: str | None, others: Mapping[str, object]
) -> tuple[list[EvaluationTask], str]:
    """Returns tasks and data, which have to be there."""
    if not task or data is None:
        raise ValueError("--task and --data say what to evaluate on; or --benchmark and --root do.")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} goes with --benchmark.")
    check_data(data)
    return task, data


def _check_benchmark(
    benchmark: PaperBenchmark, root: Path | None, inception: Path | None, others: Mapping[str, object]
) -> Path:
    """Returns the directory of the benchmark, which has to be there."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} cannot be given with --benchmark {benchmark.value}, which sets it.")
    if root is None:
        raise ValueError(f"--benchmark {benchmark.value} needs --root, the directory that its files are in.")
    check_source(root, "--root")
    if benchmark is PaperBenchmark.coco_fid and inception is None:
        raise ValueError("--benchmark coco-fid needs --inception, the weights of InceptionV3, and --clip.")
    return root


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint, its name on the Hub, or lavit-emoji-small.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="To write.", show_default=False)],
    benchmark: Annotated[
        PaperBenchmark | None,
        typer.Option(help="A benchmark of the paper, instead of --task and --data.", show_default=False),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the benchmark's files are.", show_default=False)
    ] = None,
    protocol: Annotated[
        Protocol | None,
        typer.Option(
            help="How a benchmark is asked and scored: as for the published numbers, or as other data.",
            show_default="lavit",
        ),
    ] = None,
    task: Annotated[
        list[EvaluationTask] | None,
        typer.Option("--task", "-t", help="May be given several times.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="scenes, emoji or emoji-small; the JSON file of a benchmark (COCO, NoCaps or Karpathy captions; "
            "VQAv2, OK-VQA, GQA or VizWiz questions); or a dataset, as for lavit tokenize.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="May be given several times.", show_default="validation of scenes, else test"),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="First images (or questions of a file).", show_default="1000 scenes, or all"),
    ] = None,
    num_drawings: Annotated[
        int | None, typer.Option(min=1, help="The same for tasks that draw.", show_default="--num-samples")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a file's images are.", show_default="beside it")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Answers of VQAv2 and OK-VQA.", show_default=False)
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the dataset.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.", show_default=False)] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of a dataset.", show_default="image")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the caption, or a list of them.", show_default="text")
    ] = None,
    question_column: Annotated[
        str | None, typer.Option(help="Column of the question.", show_default="question")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Column of the answer, or a list of them.", show_default="answer")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all random choices.")] = 0,
    beams: Annotated[
        int | None,
        typer.Option(min=1, help="Beams of captions and answers; 1 is greedy.", show_default="2; 5, scenes 1"),
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Length penalty of captions and answers.", show_default="1; 0")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="Shortest caption or answer, in tokens.", show_default="8; 2; scenes 1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest caption or answer, in tokens.", show_default="36, scenes 64; 10")
    ] = None,
    decoder: Annotated[
        Decoder | None, typer.Option(help="Pixel decoder.", show_default="highres; prompts of benchmarks lowres")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default="25, lowres and reconstruction 50")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, help="How much to stress the prompt.", show_default="the checkpoint's, or 4; benchmarks 1.5"
        ),
    ] = None,
    decoder_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How much to stress the tokens.",
            show_default="the checkpoint's, or 7, lowres and reconstruction 5; benchmarks 1.5",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw among so many codes.", show_default="50; benchmarks 300")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature when codes are drawn.", show_default="1")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Keep the best by CLIP.", show_default="1; benchmarks 4")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Weights of CLIP, to choose and score.", show_default=False)
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception",
            "--fid-weights",
            metavar="FILE",
            help="Weights of Inception, for the FID.",
            show_default=False,
        ),
    ] = None,
    num_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens that an image becomes; given several times, draws a curve of all.",
            show_default="as it needs",
        ),
    ] = None,
    visual_mode: Annotated[
        VisualMode | None,
        typer.Option(
            help="Read images as features (continuous) or as codes (discrete).",
            show_default="the checkpoint's, or continuous",
        ),
    ] = None,
    shown: Annotated[int, typer.Option(min=1, help="Samples on the page: the first ones.")] = 36,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile what draws pictures and writes without beams.",
            show_default="yes on a CUDA device",
        ),
    ] = None,
) -> None:
    """Measure how well a checkpoint describes, answers, draws and reconstructs.

    Writes predictions, metrics and a page of samples, and prints the metrics. Of an interrupted run, the same command
    makes the rest. Processes and machines share the work if they are started by accelerate or torchrun.

    \b
    Examples:
      lavit evaluate lavit-7b-v2 --benchmark vqav2 --root vqav2 -o out/vqav2
      lavit evaluate lavit-emoji-small --data emoji-small --task all -o out/emoji
      lavit evaluate lavit-7b-v2 --data captions.json --images val2014 --task caption -o out/coco
      lavit evaluate lavit-7b-v2 --data questions.json --annotations answers.json --images val2014 -t vqa -o out/vqa
      lavit evaluate lavit-7b-v2 --data captions.json --images val2014 -t text-to-image --clip clip-vit-l -o out/fid
      lavit evaluate lavit-emoji-small --data emoji-small --task caption --num-tokens 4 --num-tokens 16 -o out/curve
      lavit evaluate lavit-emoji-small --data emoji-small --task caption --visual-mode discrete -o out/codes
    """
    columns = {
        "--image-column": image_column,
        "--text-column": text_column,
        "--question-column": question_column,
        "--answer-column": answer_column,
    }
    given_tasks: list[EvaluationTask] = []
    given_data, given_root = "", Path()
    if benchmark is None:
        given_tasks, given_data = _check_no_benchmark(task, data, {"--root": root, "--protocol": protocol})
    else:
        set_by_it = {"--task": task, "--data": data, "--split": split, "--num-drawings": num_drawings}
        others = {"--images": images, "--annotations": annotations, "--config": config, "--revision": revision}
        given_root = _check_benchmark(benchmark, root, inception, {**set_by_it, **others, **columns})
    check_source(images, "--images")
    check_source(annotations, "--annotations", is_file=True)
    check_source(clip, "--clip")
    check_source(inception, "--inception", is_file=True)
    check_output_directory(output)
    checkpoint = find_model(checkpoint)

    from lavit_hf import evaluation
    from lavit_hf.utils.public_text import public_name

    from .loading import join_processes, load, load_pipeline

    options = {
        "num_beams": beams,
        "length_penalty": length_penalty,
        "min_new_tokens": min_new_tokens,
        "max_new_tokens": max_new_tokens,
        "decoder": decoder and decoder.value,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "decoder_guidance_scale": decoder_guidance_scale,
        "top_k": top_k,
        "temperature": temperature,
        "num_candidates": candidates,
        "clip": clip and str(clip),
        "fid_weights": inception and str(inception),
        "num_image_tokens": num_tokens[0] if num_tokens and len(num_tokens) == 1 else None,
        "visual_mode": visual_mode and visual_mode.value,
    }
    if benchmark is None:
        settings = evaluation.EvaluationSettings(
            given_data,
            tasks=() if EvaluationTask.all in given_tasks else [one.value for one in given_tasks],
            splits=split or (),
            num_samples=num_samples,
            num_drawings=num_drawings,
            images=images,
            annotations=annotations,
            config=config,
            revision=revision,
            columns=(
                image_column or "image",
                text_column or "text",
                question_column or "question",
                answer_column or "answer",
            ),
            seed=seed,
            options=options,
        )
    else:
        settings = evaluation.benchmark_settings(
            benchmark.value,
            given_root,
            protocol=(protocol or Protocol.lavit).value,
            num_samples=num_samples,
            seed=seed,
            options=options,
        )
    state, device = join_processes(device)
    with state.main_process_first():  # so that one process fills the cache of `datasets`
        tasks = evaluation.build_tasks(settings)
    left_out = [name for name in settings.tasks if name not in {task.name for task in tasks}]
    if left_out and state.is_main_process:
        print(f"Left out, as {public_name(given_data)} does not fit: {', '.join(left_out)}", file=sys.stderr)
    lavit = load(checkpoint, device, dtype.value, compile)
    evaluated = evaluation.EvaluatedCheckpoint(
        checkpoint, lavit.model, lavit.processor, functools.partial(load_pipeline, lavit)
    )
    if num_tokens and len(num_tokens) > 1:
        blind = [task.name for task in tasks if not task.sees_images]
        if blind and state.is_main_process:
            print(f"Left out, as it sees no images and has no budget: {', '.join(blind)}", file=sys.stderr)
        curve = evaluation.evaluate_budgets(
            evaluated, settings, num_tokens, output, batch_size=batch_size, num_shown=shown
        )
        text, file = evaluation.format_curve(curve), "curve.png"
    else:
        metrics = evaluation.evaluate(evaluated, tasks, output, batch_size=batch_size, num_shown=shown)
        text, file = evaluation.format_metrics(metrics), "metrics.json"
    if state.is_main_process:
        print(f"{text}\n\nWrote {output / file}")
    state.destroy_process_group()
