"""`lavit verify`: is a download complete and intact?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import check_source


def verify(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to check.", show_default=False)],
) -> None:
    """List what is missing, odd or corrupt in a checkpoint.

    DIR is a download in the original layout, with language_model/ and visual_tokenizer/ in it, or a checkpoint that
    --model takes. Nothing is written. Each problem is a line of the output; if there are any, the exit status is 1.

    \b
    Examples:
      lavit verify LaVIT-7B-v2 && lavit convert LaVIT-7B-v2 lavit-7b-v2
      lavit verify lavit-7b-v2
    """
    check_source(source, "DIR")

    from lavit_hf import conversion

    problems = conversion.verify(source)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{source} is complete.")
