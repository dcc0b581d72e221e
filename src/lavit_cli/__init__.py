"""The command `lavit`.

This module stands outside the package on purpose: importing anything of `lavit_hf` imports torch, which takes seconds
that `lavit --help` should not. The commands' bodies are in `lavit_hf.cli` and are imported when a command runs.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .checks import (
    check_data,
    check_model,
    check_new_directory,
    check_output_directory,
    check_picture_output,
    check_pictures,
    check_source,
)
from .options import (
    MAX_SEED,
    AspectRatio,
    BadSamples,
    Beams,
    Decoder,
    Device,
    Dtype,
    EvaluationTask,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    Model,
    Output,
    PixelDecoder,
    RunDtype,
    Seed,
    StoredDtype,
    TokenizedFormat,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_DEFAULT = "lavit-scenes"  # the checkpoint that comes along
_LISTED = 6  # lines of a longer message, such as a list of tensors, that still fit one line

app = typer.Typer(
    name="lavit",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def one_line(error: BaseException) -> str:
    """Says what went wrong in one line.

    Args:
        error: What was raised. Of a long message, such as a list of missing tensors, only the beginning is kept.

    Returns:
        The message, with the type of the error if it is not one made for users.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if len(lines) > _LISTED + 1:
        lines = [*lines[:_LISTED], f"and {len(lines) - _LISTED} more (lavit --debug shows all)"]
    message = " ".join(lines[:1]) + (" " + "; ".join(lines[1:]) if len(lines) > 1 else "")
    if isinstance(error, (OSError, ValueError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _in_one_line(command: _Command) -> _Command:
    """Makes a command report errors in one line and exit with 1, or with 130 if it was interrupted."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("lavit: interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if os.environ.get("LAVIT_DEBUG"):
                raise
            typer.echo(f"lavit: error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None

    return wrapper  # type: ignore[return-value]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lavit-hf {metadata.version('lavit-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also: LAVIT_DEBUG=1).")] = False,
) -> None:
    """LaVIT: describe images, ask about them, draw new ones; convert and evaluate checkpoints.

    \b
    Examples:
      lavit convert LaVIT-7B-v2 lavit-7b-v2 --dtype bfloat16
      lavit caption photo.jpg --model lavit-7b-v2
      lavit ask photo.jpg "What animal is this?" --model lavit-7b-v2
      lavit draw "a cat on a red chair" --model lavit-7b-v2 -o cat.png

    Each command has its own help: lavit caption --help
    """
    if debug:
        os.environ["LAVIT_DEBUG"] = "1"


@app.command()
@_in_one_line
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files or URLs.", show_default=False)],
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="Text the caption starts from.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Describe images, one line each.

    Of several images each line starts with the file's name and a tab. Those that cannot be read are left out, by name.

    \b
    Examples:
      lavit caption photo.jpg --model lavit-7b-v2
      lavit caption *.jpg --model lavit-7b-v2 --batch-size 16 > captions.tsv
      lavit caption photo.jpg --model lavit-7b-v2 --prompt "The weather in this picture is"
    """
    check_pictures(images)
    checkpoint = _model(model)
    from lavit_hf.cli.caption import run

    options = _generation(beams, length_penalty, min_new_tokens, max_new_tokens)
    run(
        images,
        checkpoint,
        prompt=prompt,
        batch_size=batch_size,
        device=device,
        dtype=dtype.value,
        options=options,
    )


@app.command()
@_in_one_line
def ask(
    image: Annotated[str, typer.Argument(help="Image file or URL.", show_default=False)],
    question: Annotated[str, typer.Argument(help="A question about it, in quotes.", show_default=False)],
    model: Model = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    min_new_tokens: MinNewTokens = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Answer a question about an image, in a few words.

    \b
    Examples:
      lavit ask photo.jpg "What color is the cat?" --model lavit-7b-v2
      lavit ask photo.jpg "How many people are there?" --model lavit-7b-v2 --device cuda:1
    """
    if not question.strip():
        raise ValueError("The question is empty.")
    check_pictures([image])
    checkpoint = _model(model)
    from lavit_hf.cli.ask import run

    options = _generation(beams, length_penalty, min_new_tokens, max_new_tokens)
    run(image, question, checkpoint, device=device, dtype=dtype.value, options=options)


@app.command()
@_in_one_line
def draw(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.", show_default=False)],
    output: Output,
    model: Model = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="Picture before the text; may be given several times."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.", show_default=False)] = None,
    decoder: PixelDecoder = None,
    aspect_ratio: AspectRatio = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="25, lowres 50")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="How much to stress the prompt.", show_default="4, with pictures 5")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Draw a picture of a prompt.

    \b
    Examples:
      lavit draw "a cat on a red chair" --model lavit-7b-v2 -o cat.png
      lavit draw "a fox in the snow" --model lavit-7b-v2 -o fox.png --aspect-ratio 16:9 --seed 7
      lavit draw "this dog on a beach" --image dog.jpg --model lavit-7b-v2 -o beach.png
    """
    if not prompt.strip() and not image:
        raise ValueError("The prompt is empty: say what to draw.")
    check_pictures(image or [])
    check_picture_output(output)
    checkpoint = _model(model)
    from lavit_hf.cli.draw import draw as run

    options = {"aspect_ratio": aspect_ratio, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    options["negative_prompt"] = negative_prompt
    where = {"decoder": None if decoder is None else decoder.value, "device": device, "dtype": dtype.value}
    run(prompt, image or [], checkpoint, output=output, seed=seed, options=options, **where)


@app.command()
@_in_one_line
def reconstruct(
    image: Annotated[str, typer.Argument(help="Image file or URL.", show_default=False)],
    output: Output,
    model: Model = None,
    decoder: PixelDecoder = None,
    aspect_ratio: AspectRatio = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How much to stress the tokens.")] = 5.0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Turn a picture into tokens, and draw what they say.

    \b
    Example:
      lavit reconstruct photo.jpg --model lavit-7b-v2 -o again.png
    """
    check_pictures([image])
    check_picture_output(output)
    checkpoint = _model(model)
    from lavit_hf.cli.draw import reconstruct as run

    options = {"aspect_ratio": aspect_ratio, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    where = {"decoder": None if decoder is None else decoder.value, "device": device, "dtype": dtype.value}
    run(image, checkpoint, output=output, seed=seed, options=options, **where)


@app.command()
@_in_one_line
def demo(
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Picture to look at; may be given several times.", show_default="scenes"),
    ] = None,
    model: Model = None,
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "What animal is this?",
    change: Annotated[str, typer.Option(help="What to draw of it: a text after the picture.")] = "in the snow",
    prompt: Annotated[str, typer.Option(help="What to draw from text alone.")] = "a cat on a red chair",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PICTURE", help="File to write, such as a PNG.")
    ] = Path("out/demo.png"),
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Show what becomes of pictures and prompts: tokens, captions, answers, drawings.

    Writes one with a row for each picture: itself, the patches that each of the two branches of the visual tokenizer
    keeps, the picture drawn from its own tokens, and drawn again with a change; and a row of drawings of prompts.
    Without pictures it shows scenes with questions and prompts of their own, and says what is right and what is wrong.

    \b
    Examples:
      lavit demo
      lavit demo --image photo.jpg --model lavit-7b-v2 --output photo-patches.png
    """
    check_pictures(image or [])
    check_picture_output(output)
    checkpoint = _model(model)
    from lavit_hf.cli.demo import run

    texts = {"question": question, "change": change, "prompt": prompt}
    run(image or [], checkpoint, **texts, output=output, device=device, dtype=dtype.value)


@app.command()
@_in_one_line
def tokenize(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Name on the Hub; or a directory saved by save_to_disk, of images, or of data files; or one JSON, "
            "CSV, Parquet or WebDataset file.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    model: Model = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of the dataset.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.", show_default=False)] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Do not store the dataset on the disk first.")
    ] = False,
    image_column: Annotated[str, typer.Option(help="Column of one image, or a list of them.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    no_text: Annotated[bool, typer.Option("--no-text", help="There is no text, or it is not wanted.")] = False,
    keep_column: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another column to keep; may be given several times.")
    ] = None,
    output_format: Annotated[
        TokenizedFormat, typer.Option("--format", help="Arrow files for load_from_disk, or tar files.")
    ] = TokenizedFormat.arrow,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 5000,
    on_bad_sample: Annotated[
        BadSamples, typer.Option(help="What to do about corrupt images and empty texts.")
    ] = BadSamples.skip,
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 4,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Turn the images of a dataset into codes, for training without images.

    Of an interrupted run, the same command makes the rest. Processes and machines share the work, and write to the
    same directory, if they are started by accelerate or torchrun.

    \b
    Examples:
      lavit tokenize photos photos-codes --model lavit-7b-v2
      lavit tokenize captions.jsonl codes --model lavit-7b-v2 --text-column caption --batch-size 64
      lavit tokenize user/dataset codes --model lavit-7b-v2 --streaming --format webdataset
      torchrun --nproc-per-node 8 -m lavit_cli tokenize user/dataset codes --model lavit-7b-v2
    """
    check_data(dataset)
    check_output_directory(output)
    checkpoint = _model(model)
    from lavit_hf.cli.tokenize import run

    run(
        dataset,
        output,
        checkpoint,
        split=split,
        config=config,
        revision=revision,
        streaming=streaming,
        image_column=image_column,
        text_column=None if no_text else text_column,
        keep_columns=keep_column or [],
        output_format=output_format.value,
        batch_size=batch_size,
        shard_size=shard_size,
        on_bad_sample=on_bad_sample.value,
        num_threads=threads,
        device=device,
        dtype=dtype.value,
    )


@app.command()
@_in_one_line
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint, its name on the Hub, or lavit-scenes.", show_default=False)
    ],
    task: Annotated[
        list[EvaluationTask], typer.Option("--task", "-t", help="May be given several times.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="scenes; the JSON file of a benchmark (COCO, NoCaps or Karpathy captions; VQAv2, OK-VQA, GQA or "
            "VizWiz questions); or a dataset, as for lavit tokenize.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="To write.", show_default=False)],
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
    image_column: Annotated[str, typer.Option(help="Column of a dataset.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of the caption, or a list of them.")] = "text",
    question_column: Annotated[str, typer.Option(help="Column of the question.")] = "question",
    answer_column: Annotated[str, typer.Option(help="Column of the answer, or a list of them.")] = "answer",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random.")] = 0,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Of captions and answers.", show_default="2; 5, scenes 1")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of captions and answers.", show_default="1; 0")] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="Of captions and answers.", show_default="8; 2; scenes 1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of captions and answers.", show_default="36, scenes 64; 10")
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
            min=0, help="How much to stress the tokens.", show_default="7, lowres and reconstruction 5; benchmarks 1.5"
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw among so many codes.", show_default="50; benchmarks 300")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of drawing codes.", show_default="1")] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Keep the best by CLIP.", show_default="1; benchmarks 4")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Weights of CLIP, to choose and score.", show_default=False)
    ] = None,
    fid_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of Inception, for the FID.", show_default=False)
    ] = None,
    shown: Annotated[int, typer.Option(min=1, help="Samples on the page: the first ones.")] = 36,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Measure how well a checkpoint describes, answers, draws and reconstructs.

    Writes predictions, metrics and a page of samples, and prints the metrics. Of an interrupted run, the same command
    makes the rest. Processes and machines share the work if they are started by accelerate or torchrun.

    \b
    Examples:
      lavit evaluate lavit-scenes --data scenes --task all -o out/scenes
      lavit evaluate lavit-7b-v2 --data captions.json --images val2014 --task caption -o out/coco
      lavit evaluate lavit-7b-v2 --data questions.json --annotations answers.json --images val2014 -t vqa -o out/vqa
      lavit evaluate lavit-7b-v2 --data captions.json --images val2014 -t text-to-image --clip clip-vit-l -o out/fid
    """
    check_data(data)
    check_source(images, "--images")
    check_source(annotations, "--annotations", is_file=True)
    check_source(clip, "--clip")
    check_source(fid_weights, "--fid-weights", is_file=True)
    check_output_directory(output)
    checkpoint = _model(checkpoint)
    from lavit_hf.cli.evaluate import run

    run(
        checkpoint,
        tasks=[one.value for one in task],
        output=output,
        splits=split or [],
        num_samples=num_samples,
        num_drawings=num_drawings,
        reading={
            "name": data,
            "images": images,
            "annotations": annotations,
            "config": config,
            "revision": revision,
            "columns": (image_column, text_column, question_column, answer_column),
        },
        options={
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
            "fid_weights": fid_weights and str(fid_weights),
        },
        batch_size=batch_size,
        seed=seed,
        num_shown=shown,
        device=device,
        dtype=dtype.value,
    )


@app.command()
@_in_one_line
def convert(
    source: Annotated[
        Path | None, typer.Argument(metavar="SRC", help="Directory to read.", show_default=False)
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="Directory to create.", show_default=False)
    ] = None,
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Cast the weights; by default they stay as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="vision=N,merger=N,decoder=N",
            help="Attention heads, which the weights do not tell. Not needed for the published checkpoints.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="MANIFEST", help="Only check a JSON list of names and shapes: does every tensor fit?"),
    ] = None,
    to_original: Annotated[bool, typer.Option("--to-original", help="Convert back to the original layout.")] = False,
) -> None:
    """Convert a checkpoint from the original layout, or back.

    SRC is the directory with language_model/ and visual_tokenizer/ in it. DST is what --model takes, and what
    from_pretrained loads; it appears only when it is complete. Memory stays near the size of one file of weights.

    \b
    Examples:
      lavit convert LaVIT-7B-v2 lavit-7b-v2
      lavit convert LaVIT-7B-v2 lavit-7b-v2 --dtype bfloat16 --max-shard-size 2GB
      lavit convert lavit-7b-v2 LaVIT-7B-v2-again --to-original
      lavit convert --plan manifest.json
    """
    if plan is not None:
        if source or destination or to_original or dtype:
            raise ValueError("--plan takes a manifest and --heads, and no directories: nothing is converted.")
        check_source(plan, "--plan", is_file=True)
        from lavit_hf.cli import convert as commands

        commands.show_plan(plan, heads)
        return
    if source is None or destination is None:
        raise ValueError("convert needs two directories, SRC and DST (or --plan MANIFEST); see lavit convert --help.")
    if to_original and (dtype or heads):
        raise ValueError("--to-original writes every tensor as it was; it takes no --dtype and no --heads.")
    check_source(source, "SRC")
    check_new_directory(destination)
    from lavit_hf.cli import convert as commands

    if to_original:
        commands.convert_back(source, destination)
    else:
        commands.convert_checkpoint(source, destination, dtype.value if dtype else None, max_shard_size, heads)


@app.command()
@_in_one_line
def assemble(
    language_model: Annotated[
        Path, typer.Argument(metavar="LANGUAGE_MODEL", help="Directory that stage 2 wrote.", show_default=False)
    ],
    pixel_decoder: Annotated[
        Path,
        typer.Argument(
            metavar="PIXEL_DECODER", help="Directory that stage 3 wrote, or of a LaVIT that draws.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
) -> None:
    """Join a language model and a pixel decoder that were trained apart.

    Both have to be of one visual tokenizer. OUT is what --model takes, and what publish publishes; it appears only
    when it is complete. Pixel decoders that LANGUAGE_MODEL has from before are left out.

    \b
    Example:
      lavit assemble out/lm out/pixel-decoder my-lavit
    """
    language_model, pixel_decoder = Path(_checkpoint(str(language_model))), Path(_checkpoint(str(pixel_decoder)))
    check_source(language_model, "LANGUAGE_MODEL")
    check_source(pixel_decoder, "PIXEL_DECODER")
    check_new_directory(output)
    from lavit_hf.cli.assemble import run

    run(language_model, pixel_decoder, output)


@app.command()
@_in_one_line
def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Directory of adapters of LoRA.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Checkpoint that they were trained on.", show_default="as adapter_config.json says"
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
) -> None:
    """Merge adapters of LoRA into their base, as one checkpoint.

    OUT has the weights in the precision of the base, and its pixel decoders; it appears only when it is complete.

    \b
    Examples:
      lavit merge out/lora my-lavit
      lavit merge out/lora my-lavit --base lavit-7b-v2
    """
    check_source(adapter, "ADAPTER", or_repository=True)
    check_new_directory(output)
    base = None if base is None else _model(base)
    from lavit_hf.cli.merge import run

    run(adapter, output, base, max_shard_size)


@app.command()
@_in_one_line
def publish(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory to publish.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be published, and what not and why.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="With --dry-run: show the model card instead.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Other files to publish, such as 'docs/*'; may be given several times."),
    ] = None,
    include_evaluation: Annotated[
        bool,
        typer.Option("--include-evaluation", help="Also publish predictions, pages and pictures of lavit evaluate."),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="License as the Hub names it, such as apache-2.0.", show_default="as the card says"
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(metavar="USER/NAME", help="Model the weights were made of; may be given several times."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="USER/NAME", help="Dataset they were trained on; may be given several times."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to publish to.", show_default="main")
    ] = None,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub.

    Everything in one commit: weights, processor, pixel decoders, the code that loads them where lavit-hf is not
    installed, and a model card. Other files of the directory stay at home unless --include names them; pickles, keys
    and tokens always do. Of an interrupted run, the same command uploads the rest.

    \b
    Examples:
      lavit publish lavit-7b-v2 me/lavit-7b --dry-run
      lavit publish lavit-7b-v2 me/lavit-7b --private --base-model rain1011/LaVIT-7B-v2
      lavit publish out/my-lavit me/my-lavit --license apache-2.0 --dataset me/pictures
    """
    from lavit_hf.cli.publish import run

    run(
        Path(_checkpoint(str(checkpoint))),
        repository,
        private=True if private else None,
        dry_run=dry_run,
        card=card,
        include=include or [],
        include_evaluation=include_evaluation,
        license=license,
        base_models=base_model or [],
        datasets=dataset or [],
        revision=revision,
    )


@app.command(name="export-llama")
@_in_one_line
def export_llama(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory to read.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
) -> None:
    """Write the language model as a plain Llama, for servers.

    It reads and writes images as visual codes, and needs no code of its own: vLLM, SGLang and llama.cpp take it as any
    other Llama.

    \b
    Example:
      lavit export-llama lavit-7b-v2 lavit-7b-llama
    """
    check_new_directory(output)
    from lavit_hf.cli.export_llama import run

    run(Path(_checkpoint(str(checkpoint))), output, max_shard_size)


def _model(model: str | None) -> str:
    """The checkpoint of this name, of which `--model` can make use."""
    checkpoint = _checkpoint(model)
    check_model(checkpoint)
    return checkpoint


def _checkpoint(model: str | None) -> str:
    """The checkpoint of this name; the one that comes along can be named from anywhere."""
    if model is None or (model == _DEFAULT and not Path(model).exists()):
        from lavit_hf import default_checkpoint

        return default_checkpoint()
    return model


def _generation(
    beams: int | None, length_penalty: float | None, min_new_tokens: int | None, max_new_tokens: int | None
) -> dict[str, Any]:
    return {
        "num_beams": beams,
        "length_penalty": length_penalty,
        "min_new_tokens": min_new_tokens,
        "max_new_tokens": max_new_tokens,
    }


def main() -> None:
    """Runs the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a command's body
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
