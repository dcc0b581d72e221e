"""`lavit convert`: from the original layout to that of transformers, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import check_new_directory, check_source
from .options import MaxShardSize, StoredDtype


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
    max_shard_size: MaxShardSize = "5GB",
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

        from lavit_hf import conversion

        print(conversion.plan(plan, heads=heads))
        return
    if source is None or destination is None:
        raise ValueError("convert needs two directories, SRC and DST (or --plan MANIFEST); see lavit convert --help.")
    if to_original and (dtype or heads):
        raise ValueError("--to-original writes every tensor as it was; it takes no --dtype and no --heads.")
    check_source(source, "SRC")
    check_new_directory(destination)

    from lavit_hf import conversion

    if to_original:
        conversion.convert_to_original(source, destination)
        print(f"Wrote {destination}.")
    else:
        conversion.convert(
            source, destination, dtype=dtype and dtype.value, max_shard_size=max_shard_size, heads=heads
        )
        print(f"Wrote {destination}. Try it: lavit caption IMAGE --model {destination}")
