"""`lavit merge`: merges adapters of LoRA into their base."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_new_directory, check_source, find_model
from .options import MaxShardSize, NewDirectory


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Directory of adapters of LoRA.", show_default=False)
    ],
    output: NewDirectory,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Checkpoint that they were trained on.", show_default="as adapter_config.json says"
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
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
    base = None if base is None else find_model(base)

    from transformers.utils import logging

    from lavit_hf.training import merge_adapter
    from lavit_hf.training.language_model.adapters import find_adapter

    from .loading import bars_of_loading

    logging.set_verbosity_error()
    found = find_adapter(adapter, base)
    with bars_of_loading(found.base if found else adapter):
        merge_adapter(adapter, output, base=base, max_shard_size=max_shard_size)
    print(f"Wrote {output}. Try it: lavit caption IMAGE --model {output}")
