"""The command `lavit`: one file per command, in which its options stand beside its body.

The package stands outside of `lavit_hf` on purpose: importing anything of that imports torch, which takes seconds that
`lavit --help` should not. So a command's file imports nothing heavy at its top, and refuses what is not there before
its body imports what it works with: `lavit_hf`, and `loading`, `generation`, `pictures` and `demo_sheet` of this
package, which stand on it.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from . import (
    ask,
    assemble,
    caption,
    convert,
    demo,
    draw,
    evaluate,
    export_llama,
    merge,
    plan_training,
    plot,
    publish,
    reconstruct,
    serve,
    tokenize,
    verify,
)
from .errors import INTERRUPTED, in_one_line

app = typer.Typer(
    name="lavit",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lavit-hf {metadata.version('lavit-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also: LAVIT_DEBUG=1).")] = False,
) -> None:
    """LaVIT: describe images, ask about them, draw new ones; convert and evaluate checkpoints.

    \b
    Examples:
      lavit convert LaVIT-7B-v2 lavit-7b-v2 --dtype bfloat16
      lavit caption photo.jpg --model lavit-7b-v2
      lavit ask photo.jpg "What animal is this?" --model lavit-7b-v2
      lavit draw "a cat on a red chair" --model lavit-7b-v2 -o cat.png

    Each command has its own help: lavit caption --help
    """
    if debug:
        os.environ["LAVIT_DEBUG"] = "1"


for _command in (  # in the order of --help
    caption.caption,
    ask.ask,
    draw.draw,
    reconstruct.reconstruct,
    demo.demo,
    serve.serve,
    tokenize.tokenize,
    evaluate.evaluate,
    plot.plot,
    plan_training.plan_training,
    verify.verify,
    convert.convert,
    assemble.assemble,
    merge.merge,
    publish.publish,
    export_llama.export_llama,
):
    app.command()(in_one_line(_command))


def main() -> None:
    """Runs the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a command's body
        sys.exit(INTERRUPTED)
