"""`lavit assemble`."""

from __future__ import annotations

from pathlib import Path

from ..training.assembly import assemble


def run(language_model: Path, pixel_decoder: Path, output: Path) -> None:
    """Joins a language model and pixel decoders."""
    assemble(language_model, pixel_decoder, output)
    print(f'Wrote {output}. Try it: lavit draw "a cat" --model {output} -o cat.png')
