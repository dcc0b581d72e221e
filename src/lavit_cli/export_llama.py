"""`lavit export-llama`: writes the language model as a plain Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import check_new_directory, check_source, find_checkpoint
from .options import MaxShardSize, NewDirectory, StoredDtype


def export_llama(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory to read.", show_default=False)],
    output: NewDirectory,
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Cast the weights; by default they stay as stored.")
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write model.gguf for llama.cpp; needs gguf.")] = False,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Write the language model as a plain Llama, for servers.

    It reads and writes images as visual codes, and needs no code of its own: vLLM, SGLang and llama.cpp take it as any
    other Llama. A README.md there tells how.

    \b
    Examples:
      lavit export-llama lavit-7b-v2 lavit-7b-llama
      lavit export-llama lavit-7b-v2 lavit-7b-llama --dtype bfloat16 --gguf
    """
    check_new_directory(output)
    source = Path(find_checkpoint(str(checkpoint)))
    check_source(source, "CHECKPOINT")

    from lavit_hf import hub

    hub.export_llama(source, output, dtype=dtype and dtype.value, gguf=gguf, max_shard_size=max_shard_size)
    print(f"Wrote {output}. It loads as LlamaForCausalLM, without lavit-hf.")
