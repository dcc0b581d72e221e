"""`lavit assemble`: joins a language model and a pixel decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import check_new_directory, check_source, find_checkpoint
from .options import NewDirectory


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
    output: NewDirectory,
) -> None:
    """Join a language model and a pixel decoder that were trained apart.

    Both have to be of one visual tokenizer. OUT is what --model takes, and what publish publishes; it appears only
    when it is complete. Pixel decoders that LANGUAGE_MODEL has from before are left out.

    \b
    Example:
      lavit assemble out/lm out/pixel-decoder my-lavit
    """
    language_model, pixel_decoder = (Path(find_checkpoint(str(path))) for path in (language_model, pixel_decoder))
    check_source(language_model, "LANGUAGE_MODEL")
    check_source(pixel_decoder, "PIXEL_DECODER")
    check_new_directory(output)

    from lavit_hf import training

    training.assemble(language_model, pixel_decoder, output)
    print(f'Wrote {output}. Try it: lavit draw "a cat" --model {output} -o cat.png')
