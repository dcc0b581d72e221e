"""Options that several commands of `lavit` have, and the values they take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MAX_SEED = 2**63 - 1


class Dtype(StrEnum):
    """Precision of the model while it runs."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StoredDtype(StrEnum):
    """Precision of weights that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Decoder(StrEnum):
    """Which of a checkpoint's pixel decoders draws."""

    highres = "highres"
    lowres = "lowres"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR",
        help="Checkpoint, or its name on the Hub.",
        show_default="lavit-emoji-small, a small one that comes along",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes cuda if there is one.")]
RunDtype = Annotated[
    Dtype, typer.Option(help="auto is bfloat16 or float16 on a CUDA device, float32 on a CPU, elsewhere as stored.")
]
# What becomes codes once and for all is not rounded more than it is in the checkpoint.
EncodeDtype = Annotated[Dtype, typer.Option(help="auto is float32 on a CPU, and as stored elsewhere.")]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Compile on a CUDA device what runs often; the first picture waits for it, so that one takes longer.",
    ),
]
CompileText = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Compile on a CUDA device what writes texts, with --beams 1. The first texts wait for it.",
    ),
]
ImageSource = Annotated[str, typer.Argument(help="Image file or URL.", show_default=False)]
NewDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")]
# Of these, a checkpoint's generation config may have defaults of its own.
Beams = Annotated[
    int | None, typer.Option(min=1, help="Beams of the search; 1 is greedy.", show_default="2, answers 5")
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(help="Above 0 favors longer texts, below 0 shorter ones.", show_default="1, answers 0"),
]
MinNewTokens = Annotated[
    int | None, typer.Option(min=0, help="Shortest text, in tokens.", show_default="8, answers 2")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest text, in tokens.", show_default="36, answers 10")
]
NumTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that a picture becomes: its likeliest patches.", show_default="as it needs"),
]
Region = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="Box of a picture, in pixels, where tokens are worth more; may be given several times.",
        show_default=False,
    ),
]
PixelDecoder = Annotated[
    Decoder | None,
    typer.Option(help="Pixel decoder of the checkpoint.", show_default="highres, if there is more than one"),
]
AspectRatio = Annotated[
    str | None, typer.Option(metavar="W:H", help="1:1, 4:3, 3:2, 16:9, 2:3 or 3:4.", show_default="square")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=MAX_SEED, help="The same seed draws the same picture.", show_default="random")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="PICTURE", help="PNG, JPEG, WebP, TIFF or BMP to write.", show_default=False
    ),
]
