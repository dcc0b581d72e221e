"""Tokenizes images once, before training: a language model then trains on codes alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ...data import import_datasets
from ...data.loading import load_saved, named_errors
from ...modeling.configuration_lavit import LavitVisualTokenizerConfig
from ...modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer, resolve_budget
from ...processing.processing_lavit import ImageTextProcessor
from ...utils.distributed import process_state
from ...utils.fingerprints import tensor_fingerprint
from ...utils.paths import resolve_inside
from ...utils.progress import progress_bar
from .directory import FORMATS, TokenizationReport, TokenizedDirectory, read_metadata
from .rows import RowTokenizer
from .source import TokenizedSource

_POLL = 2.0  # seconds between two looks at what others have claimed


def codebook_fingerprint(visual_tokenizer: Any) -> str:
    """SHA-256 of the codebook, `[codebook_size, codebook_dim]` in fp32; equal exactly if codes mean the same.

    Args:
        visual_tokenizer: A `LavitVisualTokenizer`, or a model that has one.
    """
    quantizer = _visual_tokenizer_of(visual_tokenizer).discrete.quantizer
    assert quantizer is not None  # only the continuous branch has none
    return tensor_fingerprint([("codebook", quantizer.codebook.weight.float())])


def weights_fingerprint(visual_tokenizer: Any) -> str:
    """SHA-256 of all weights that an image's codes depend on, with their dtypes."""
    tokenizer = _visual_tokenizer_of(visual_tokenizer)
    names = sorted(name for name in tokenizer.state_dict() if not name.startswith("continuous."))
    return tensor_fingerprint([(name, tokenizer.state_dict()[name]) for name in names])


def _visual_tokenizer_of(model: Any) -> LavitVisualTokenizer:
    found = model if isinstance(model, LavitVisualTokenizer) else getattr(model, "visual_tokenizer", None)
    if not isinstance(found, LavitVisualTokenizer):
        raise TypeError(f"Expected a visual tokenizer, or a model with one, got {type(model).__name__}.")
    return found


def tokenize_dataset(
    dataset: Any,
    output_dir: str | os.PathLike,
    processor: ImageTextProcessor,
    *,
    image_column: str = "image",
    text_column: str | None = "text",
    keep_columns: Sequence[str] = (),
    output_format: str = "arrow",
    num_image_tokens: int | None = None,
    batch_size: int = 16,
    shard_size: int = 5000,
    on_bad_sample: str = "skip",
    image_root: str | os.PathLike | None = None,
    checkpoint: str | None = None,
    dataset_name: str | None = None,
    num_threads: int = 4,
    progress: bool = True,
) -> TokenizationReport:
    """Turns the images of a dataset into codes, as the discrete form of the processor has them.

    Under `accelerate launch` or `torchrun`, processes and machines share the work; all have to see `output_dir`. So do
    workers that are started one by one, at any time, and know nothing of one another: each claims a shard, does it,
    and claims the next. What one had claimed that dies is another's, at once on the same machine, on others after 3
    minutes. All return when everything is there. The result depends neither on their number nor on who is faster, and
    in float32 not on the size of batches either. What was interrupted, by whatever means, goes on where it stopped
    when the same call is made again. A stream has to end; each of its files is read by one process, or, if there are
    fewer files than processes of `torchrun`, by all.

    Rows become, in order, `codes` (a list of codes per image), `text`, `length` (ids of the row: codes, two more per
    image, and those of the text) and `sample_id` (the row's index, or its column of this name; in a stream of several
    files, file * 2**32 + row). Columns `prompt` and `messages` are kept. [`load_tokenized_dataset`] reads the result,
    as does `datasets.load_from_disk` (`"arrow"`) or `datasets.load_dataset` (`"webdataset"`).

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset`.
        output_dir: Where to write; new, or of an earlier call with the same data, checkpoint and options.
        processor: Of the checkpoint, with its visual tokenizer, on the device that is to encode; without one it loads
            it, in fp32 on the CPU.
        image_column: Where the images are: one, a list of them, or none.
        text_column: Where the text is; `None` for images alone.
        keep_columns: Further columns to keep.
        output_format: `"arrow"`, or `"webdataset"` for tar files with a JSON file per row.
        num_image_tokens: How many codes an image becomes; by default the visual tokenizer decides.
        batch_size: Images to encode at a time. In half precision kernels for other sizes round differently, which may
            change a few codes: what was begun with one has to be continued with it.
        shard_size: Samples per file, and how much work an interruption costs at most.
        on_bad_sample: A sample whose image cannot be decoded, or whose text is missing or blank: `"skip"` leaves it
            out, with a note in the report, `"raise"` stops.
        image_root: Where relative paths of images start, if the column holds paths; one that leaves it makes a bad
            sample. Without it, paths are taken for the caller's own.
        checkpoint: Name of the checkpoint, to be written down.
        dataset_name: Name of the dataset, to be written down.
        num_threads: Threads that decode images.
        progress: Whether to show a bar.

    Returns:
        What became of the dataset, the same in all processes.

    Raises:
        ImportError: `datasets` or `accelerate` is not installed.
        TypeError: `dataset` is something else.
        ValueError: An option or column does not exist, `output_dir` holds something else, or samples are bad.
    """
    _check_options(output_format, on_bad_sample, batch_size, shard_size)
    datasets = import_datasets()
    visual_tokenizer = processor.get_visual_tokenizer()
    state = process_state(visual_tokenizer.device)
    source = TokenizedSource(dataset, image_column, text_column, keep_columns, shard_size)
    features = datasets.Features(_features(datasets, source, text_column))
    directory = TokenizedDirectory(Path(output_dir), output_format, features)
    root = None if image_root is None else Path(image_root)
    about = {
        "checkpoint": checkpoint or str(visual_tokenizer.name_or_path or "unknown"),
        "codebook_fingerprint": codebook_fingerprint(visual_tokenizer),
        "dataset": dataset_name,
    }
    settings = {
        **_processor_settings(processor),
        "batch_size": None if visual_tokenizer.dtype == torch.float32 else batch_size,
        "data": source.digest(root),
        "image_column": image_column,
        "text_column": text_column,
        "keep_columns": sorted(keep_columns),
        "output_format": output_format,
        "shard_size": shard_size,
        "on_bad_sample": on_bad_sample,
        **_budget_settings(visual_tokenizer.config, num_image_tokens),
    }
    with state.main_process_first():
        directory.open(about, settings)
    if not directory.is_complete:
        if source.length is not None and state.is_main_process:
            directory.finish_source(0, source.num_shards())
        kept = {name: features[name] for name in source.kept_columns if name != "sample_id"}
        rows = RowTokenizer(
            processor, image_column, text_column, kept, batch_size, root, on_bad_sample, num_image_tokens
        )
        _write_shards(source, directory, rows, state, num_threads, progress)
        state.wait_for_everyone()
        if state.num_processes == 1:
            _merge_once(source, directory)
        elif state.is_main_process:
            directory.merge(source.num_sources)
    state.wait_for_everyone()
    return directory.report()


def load_tokenized_dataset(path: str | os.PathLike, visual_tokenizer: Any = None) -> Any:
    """Reads what [`tokenize_dataset`] wrote.

    Args:
        path: Its directory.
        visual_tokenizer: A `LavitVisualTokenizer`, or a model that has one: the codes have to be of its codebook.

    Returns:
        A `datasets.Dataset` with the columns `codes`, `text`, `length`, `sample_id`, and those that were kept.

    Raises:
        ValueError: It is not complete, the codes are of another codebook, or a file of it is damaged or elsewhere.
    """
    datasets = import_datasets()
    metadata = read_metadata(path)
    if visual_tokenizer is not None:
        wanted = codebook_fingerprint(visual_tokenizer)
        if metadata["codebook_fingerprint"] != wanted:
            raise ValueError(
                f"The codes in {path} were made by {metadata['checkpoint']}, whose codebook is another one "
                f"({metadata['codebook_fingerprint'][:12]}..., here {wanted[:12]}...). Tokenize the data again."
            )
    if metadata["settings"]["output_format"] == "arrow":
        return load_saved(Path(path))
    files = sorted(str(file) for file in (Path(path) / "data").glob("*.tar"))
    for file in files:
        resolve_inside(path, os.path.relpath(file, path), str(path))
    with named_errors(path):
        rows = datasets.load_dataset("webdataset", data_files=files, split="train").select_columns(["json"])
    return rows.flatten().rename_columns({f"json.{name}": name for name in rows.features["json"]})


def _write_shards(
    source: TokenizedSource,
    directory: TokenizedDirectory,
    rows: RowTokenizer,
    state: Any,
    num_threads: int,
    progress: bool,
) -> None:
    """This process's shards, as far as they are not there already.

    One that is alone shares the work with others of the same command, which it does not know. They claim shards, and
    each waits for what is not its own, as others may die.
    """
    claims = directory.claims if state.num_processes == 1 else None
    visual_tokenizer = rows.processor.get_visual_tokenizer()
    was_training = visual_tokenizer.training
    visual_tokenizer.eval()  # encoders with dropout would give other codes every time
    total = None if source.length is None else -(-source.length // state.num_processes)
    bar = progress_bar("Tokenizing", total, progress and state.is_main_process, unit="sample")
    try:
        with ThreadPoolExecutor(num_threads) as executor, bar:
            while True:
                shards = source.shards(state.process_index, state.num_processes, directory, claims)
                with closing(shards):  # or an error would keep the claim
                    for shard, samples in shards:
                        directory.finish(shard, *rows.tokenize(samples, executor, bar.update))
                if claims is None or directory.is_complete or _is_all_there(source, directory):
                    break
                time.sleep(_POLL)
    finally:
        visual_tokenizer.train(was_training)


def _is_all_there(source: TokenizedSource, directory: TokenizedDirectory) -> bool:
    return all(map(directory.is_source_finished, range(source.num_sources)))


def _merge_once(source: TokenizedSource, directory: TokenizedDirectory) -> None:
    """Has one of several workers merge, and the others wait for it."""
    while not directory.is_complete:
        with directory.claims.claim("merge") as is_claimed:
            if is_claimed and not directory.is_complete:
                directory.merge(source.num_sources)
        if not directory.is_complete:
            time.sleep(_POLL)


def _features(datasets: Any, source: TokenizedSource, text_column: str | None) -> dict[str, Any]:
    value = datasets.Value
    columns: dict[str, Any] = {"codes": datasets.List(datasets.List(value("int32")))}
    columns.update(source.features([name for name in source.kept_columns if name != "sample_id"]))
    if text_column is not None:
        columns["text"] = value("string")
    return {**columns, "length": value("int32"), "sample_id": value("int64")}


def _processor_settings(processor: ImageTextProcessor) -> dict[str, Any]:
    image_processor = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    return {
        "visual_tokenizer": weights_fingerprint(processor.get_visual_tokenizer()),
        "image_processor": hashlib.sha256(image_processor.encode()).hexdigest(),
        "text_tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
    }


def _budget_settings(config: LavitVisualTokenizerConfig, num_image_tokens: int | None) -> dict[str, Any]:
    """What decides how many codes there are, unless it is what it was before there were budgets.

    Raises:
        ValueError: If no image can become so many codes.
    """
    if num_image_tokens is not None:
        resolve_budget(num_image_tokens, None, 1, config.num_patches)
        return {"num_image_tokens": num_image_tokens}
    return {} if config.selection == "argmax" else {"selection": config.selection}


def _check_options(output_format: str, on_bad_sample: str, batch_size: int, shard_size: int) -> None:
    if output_format not in FORMATS:
        raise ValueError(f"`output_format` must be one of {', '.join(FORMATS)}, got {output_format!r}.")
    if on_bad_sample not in ("skip", "raise"):
        raise ValueError(f"`on_bad_sample` must be 'skip' or 'raise', got {on_bad_sample!r}.")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"`batch_size` and `shard_size` must be at least 1, got {batch_size} and {shard_size}.")
