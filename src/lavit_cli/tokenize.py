"""`lavit tokenize`: turns the images of a dataset into codes."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import check_data, check_output_directory, find_model
from .options import Device, Dtype, EncodeDtype, Model, NumTokens

if TYPE_CHECKING:
    from lavit_hf.training.precompute_codes.directory import TokenizationReport

_SHOWN = 5  # bad samples; all are in tokenization.json


class Format(StrEnum):
    """Files that codes are stored in."""

    arrow = "arrow"
    webdataset = "webdataset"


class BadSamples(StrEnum):
    """What to do about samples that cannot be used."""

    skip = "skip"
    stop = "raise"


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
        Format, typer.Option("--format", help="Arrow files for load_from_disk, or tar files.")
    ] = Format.arrow,
    num_tokens: NumTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 5000,
    on_bad_sample: Annotated[
        BadSamples, typer.Option(help="What to do about corrupt images and empty texts.")
    ] = BadSamples.skip,
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 4,
    device: Device = "auto",
    dtype: EncodeDtype = Dtype.auto,
) -> None:
    """Turn the images of a dataset into codes, for training without images.

    Of an interrupted run, the same command makes the rest. Processes and machines share the work, and write to the
    same directory, if they are started by accelerate or torchrun. So does the same command wherever and whenever it is
    started again: each takes a file of the result after another, also those of one that was killed.

    \b
    Examples:
      lavit tokenize photos photos-codes --model lavit-7b-v2
      lavit tokenize captions.jsonl codes --model lavit-7b-v2 --text-column caption --batch-size 64
      lavit tokenize user/dataset codes --model lavit-7b-v2 --streaming --format webdataset
      torchrun --nproc-per-node 8 -m lavit_cli tokenize user/dataset codes --model lavit-7b-v2
    """
    check_data(dataset)
    check_output_directory(output)
    checkpoint = find_model(model)

    from lavit_hf.data.loading import load_data
    from lavit_hf.training import tokenize_dataset

    from .loading import join_processes, load_processor

    state, device = join_processes(device)
    with state.main_process_first():  # so that one process fills the cache of `datasets`
        data, root = load_data(dataset, split, config, revision, streaming)
    report = tokenize_dataset(
        data,
        output,
        load_processor(checkpoint, device, dtype.value),
        image_column=image_column,
        text_column=None if no_text else text_column,
        keep_columns=keep_column or [],
        output_format=output_format.value,
        num_image_tokens=num_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        on_bad_sample=on_bad_sample.value,
        image_root=root,
        checkpoint=checkpoint,
        dataset_name=dataset,
        num_threads=threads,
    )
    if state.is_main_process:
        _print_report(report)
    state.destroy_process_group()


def _print_report(report: TokenizationReport) -> None:
    mean = report.num_codes / max(report.num_images, 1)
    print(f"Wrote {report.path}: {report.num_rows} rows, {report.num_images} images, {mean:.1f} codes per image")
    if not report.bad_samples:
        return
    print(f"{len(report.bad_samples)} of {report.num_samples} samples are bad and left out:", file=sys.stderr)
    for sample_id, reason in report.bad_samples[:_SHOWN]:
        print(f"  {sample_id}: {reason}", file=sys.stderr)
    if len(report.bad_samples) > _SHOWN:
        rest = len(report.bad_samples) - _SHOWN
        print(f"  and {rest} more, all listed in {report.path / 'tokenization.json'}", file=sys.stderr)
