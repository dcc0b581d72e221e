"""Self-contained copies of the pipeline and of the token decoder, for users without this package.

diffusers loads a class that it does not know from a Python file beside its weights, and fetches only this one file. So
each is made of the module that defines the class and of whatever that needs from other modules here.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..remote_code.bundle import bundle

PIPELINE_MODULE = "pipeline_lavit_pixel_decoder"
PIPELINE_CLASS = "LavitPixelDecoderPipeline"
TOKEN_DECODER = "token_decoder"
TOKEN_DECODER_MODULE = "lavit_token_decoder"
TOKEN_DECODER_CLASS = "LavitTokenDecoder"

_PACKAGE = Path(__file__).resolve().parents[1]


def pipeline_code() -> str:
    """The pipeline as one file."""
    return bundle(_PACKAGE / "pipelines" / f"{PIPELINE_MODULE}.py")


def token_decoder_code() -> str:
    """The token decoder as one file."""
    return bundle(_PACKAGE / "modeling" / "modeling_lavit_token_decoder.py")


def names_our_pipeline(folder: Path) -> bool:
    """Whether the `model_index.json` of a directory names the pipeline of this package by its file of code."""
    index = folder / "model_index.json"
    if not index.is_file():
        return False
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == [PIPELINE_MODULE, PIPELINE_CLASS]


def write_code(folder: Path) -> list[Path]:
    """Writes both files into the directory of a pixel decoder; returns where they are."""
    code = {
        folder / f"{PIPELINE_MODULE}.py": pipeline_code(),
        folder / TOKEN_DECODER / f"{TOKEN_DECODER_MODULE}.py": token_decoder_code(),
    }
    for file, text in code.items():
        file.write_text(text, encoding="utf-8")
    return list(code)
