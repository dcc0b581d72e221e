"""`lavit tokenize`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.loading import load_data
from ..training.tokenization.directory import TokenizationReport
from ..training.tokenization.tokenize_dataset import tokenize_dataset
from ..utils.distributed import process_state
from .loading import load_processor, resolve_device

_SHOWN = 5  # bad samples; all are in tokenization.json


def run(
    dataset: str,
    output: Path,
    model: str,
    *,
    split: str,
    config: str | None,
    revision: str | None,
    streaming: bool,
    image_column: str,
    text_column: str | None,
    keep_columns: Sequence[str],
    output_format: str,
    batch_size: int,
    shard_size: int,
    on_bad_sample: str,
    num_threads: int,
    device: str,
    dtype: str,
) -> None:
    """Tokenizes a dataset; the first process says what became of it."""
    state = process_state(resolve_device(device))
    if device == "auto" and state.num_processes > 1:
        device = str(state.device)  # each process its own
    with state.main_process_first():  # so that one process fills the cache of `datasets`
        data, root = load_data(dataset, split, config, revision, streaming)
    report = tokenize_dataset(
        data,
        output,
        load_processor(model, device, dtype),
        image_column=image_column,
        text_column=text_column,
        keep_columns=keep_columns,
        output_format=output_format,
        batch_size=batch_size,
        shard_size=shard_size,
        on_bad_sample=on_bad_sample,
        image_root=root,
        checkpoint=model,
        dataset_name=dataset,
        num_threads=num_threads,
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
