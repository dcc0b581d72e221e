"""`lavit export-llama`."""

from __future__ import annotations

from pathlib import Path

from ..hub import export_llama


def run(checkpoint: Path, output: Path, max_shard_size: str) -> None:
    """Writes the language model as a plain Llama."""
    export_llama(checkpoint, output, max_shard_size=max_shard_size)
    print(f"Wrote {output}. It loads as LlamaForCausalLM, without lavit-hf.")
