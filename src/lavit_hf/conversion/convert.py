"""Converts a checkpoint in the original layout to one directory that `from_pretrained` loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..pipelines.pixel_decoder_files import save_pipelines
from ..utils.progress import progress_bar
from . import names
from .atomic import check_destination, check_space, complete_directory
from .components import check_components
from .configs import infer_configs
from .errors import ConversionError, listing
from .mapping import CheckpointMapping, map_checkpoint
from .model_card import save_model_card
from .processor import build_processor, save_generation_config
from .shards import check_shard_size
from .source import OriginalCheckpoint
from .tensors import resolve_dtype
from .writer import ConvertedWriter


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    heads: Mapping[str, int] | str | None = None,
    progress: bool = True,
) -> Path:
    """Converts a checkpoint in the original layout.

    Args:
        src: Directory with `visual_tokenizer/`, `language_model/` and, optionally, the pixel decoders.
        dst: Directory to create. It appears only when it is complete.
        dtype: Casts the model and the token decoders; by default every tensor stays as stored.
        max_shard_size: Largest size of a file of weights. About this much memory is needed.
        heads: Numbers of attention heads, as in `"vision=16,merger=16,decoder=16"`; needed unless the vision width is
            the published one.
        progress: Whether to show progress bars.

    Returns:
        The created directory.

    Raises:
        ConversionError: The source is incomplete, broken or of other dimensions, or the destination cannot be written.
    """
    destination = Path(dst)
    check_destination(destination)
    check_shard_size(max_shard_size)
    cast = resolve_dtype(dtype)
    source = OriginalCheckpoint(src)
    configs = infer_configs(source.headers, source.text_config, heads)
    mapping = map_checkpoint(source.headers, configs)
    check_components(source)
    processor = build_processor(source, configs.model)
    _verify(source, progress)
    _settle_overridden(source, mapping)
    writer = ConvertedWriter(source, configs, mapping, cast, max_shard_size)
    check_space(destination, writer.total_bytes)
    with complete_directory(destination) as folder:
        with progress_bar("Writing", writer.total_bytes, progress) as bar:
            writer.write(folder, bar.update)
        processor.save_pretrained(folder)
        save_generation_config(source, configs.model, folder)
        save_pipelines(configs.model, folder)
        save_model_card(folder)
    return destination


def _verify(source: OriginalCheckpoint, progress: bool) -> None:
    total = sum(path.stat().st_size for weights in source.all_weights() for path in weights.files)
    with progress_bar("Checking", total, progress) as bar:
        source.verify(bar.update)


def _settle_overridden(source: OriginalCheckpoint, mapping: CheckpointMapping) -> None:
    """Keeps overridden tensors aside, unless they equal what overrides them; then they are not stored twice."""
    differing = []
    for (file, name), winner in mapping.overridden.items():
        own, other = source.read(file, name), source.read(*winner)
        if own.dtype == other.dtype and torch.equal(own, other):
            continue
        mapping.unused.append((file, name))
        rounded_alike = torch.equal(own, other.to(own.dtype)) or torch.equal(own.to(other.dtype), other)
        if file == names.STAGE2 and name.startswith("encoder.") and not rounded_alike:
            differing.append(f"{file}: {name} differs from {winner[0]}: {winner[1]}")
    if differing:
        raise ConversionError(listing("Both branches share one vision encoder, but the files hold two:", differing))
