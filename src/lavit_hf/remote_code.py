"""The code that travels with weights, for those who load them without this package.

transformers runs files that lie beside the weights and import each other by `from .name import`. They are copies of
the package's own, and `auto_map` in the configurations says which class is where. diffusers fetches a single file for
each part of a pipeline, so there a file is joined with those that it imports.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .utils.atomic_files import write_json
from .utils.json_files import read_json_object

PIPELINE_MODULE, PIPELINE_CLASS = "pipeline_lavit_pixel_decoder", "LavitPixelDecoderPipeline"
TEXT_TO_IMAGE_MODULE, TEXT_TO_IMAGE_CLASS = "pipeline_lavit_text_to_image", "LavitTextToImagePipeline"
TOKEN_DECODER = "token_decoder"
TOKEN_DECODER_MODULE, TOKEN_DECODER_CLASS = "lavit_token_decoder", "LavitTokenDecoder"

_PACKAGE = Path(__file__).resolve().parent
# Which classes a configuration means: the key that tells, and by its value what `auto_map` has to say.
_TOKENIZER = {"AutoTokenizer": [None, "tokenization_lavit.LavitTokenizer"]}  # one without `tokenizers`, one with
_IMAGE_PROCESSOR = {  # that of PIL, that of torchvision
    "AutoImageProcessor": [
        "image_processing_pil_lavit.LavitImageProcessorPil",
        "image_processing_lavit.LavitImageProcessor",
    ]
}
_CLASSES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "config.json": (
        "model_type",
        {
            "lavit": {
                "AutoConfig": "configuration_lavit.LavitConfig",
                "AutoModel": "modeling_lavit.LavitModel",
                "AutoModelForImageTextToText": "modeling_lavit.LavitForConditionalGeneration",
                "AutoModelForMultimodalLM": "modeling_lavit.LavitForConditionalGeneration",
            },
            "lavit_visual_tokenizer": {
                "AutoConfig": "configuration_lavit.LavitVisualTokenizerConfig",
                "AutoModel": "modeling_lavit_visual_tokenizer.LavitVisualTokenizer",
            },
        },
    ),
    "processor_config.json": (
        "processor_class",
        {"ImageTextProcessor": {"AutoProcessor": "processing_lavit.ImageTextProcessor"}},
    ),
    "preprocessor_config.json": (
        "image_processor_type",
        {"LavitImageProcessorPil": _IMAGE_PROCESSOR, "LavitImageProcessor": _IMAGE_PROCESSOR},
    ),
    "tokenizer_config.json": ("tokenizer_class", {"LavitTokenizer": _TOKENIZER}),
}
# The files named above; what these import travels with them.
_FILES = (
    "modeling/configuration_lavit.py",
    "modeling/modeling_lavit.py",
    "modeling/modeling_lavit_visual_tokenizer.py",
    "processing/processing_lavit.py",
    "processing/tokenization_lavit.py",
    "processing/image_processing_pil_lavit.py",
    "processing/image_processing_lavit.py",
)
_NOTICE = "# Made by lavit-hf from its own files: change it there. License: Apache-2.0."


def save_remote_code(folder: Path) -> None:
    """Writes the code files into a directory, and names their classes in the configurations that are in it.

    Does nothing where there is nothing of LaVIT's.
    """
    is_ours = False
    for name in _CLASSES:
        if not (folder / name).is_file():
            continue
        config = read_json_object(folder / name)
        if name == "processor_config.json":
            _add_auto_map(config.get("image_processor") or {}, "preprocessor_config.json")
        if _add_auto_map(config, name):
            is_ours = True
            write_json(folder / name, config, sort_keys=True)
    if is_ours:
        for name, code in code_files().items():
            (folder / name).write_text(code, encoding="utf-8")


def _add_auto_map(config: dict[str, Any], name: str) -> bool:
    """Says in a configuration, which a file of that name may hold, where its classes are; false if they are others."""
    key, auto_maps = _CLASSES[name]
    if (auto_map := auto_maps.get(str(config.get(key)))) is None:
        return False
    config["auto_map"] = auto_map
    return True


@functools.cache
def code_files() -> dict[str, str]:
    """The files of code that transformers needs, by name."""
    return copy_files([_PACKAGE / file for file in _FILES])


@functools.cache
def pipeline_code() -> str:
    """The pixel decoder's pipeline as one file."""
    return join_files(_PACKAGE / "pipelines" / f"{PIPELINE_MODULE}.py")


@functools.cache
def text_to_image_code() -> str:
    """The pipeline of prompts as one file, with the language model and the processor, which diffusers cannot load."""
    return join_files(_PACKAGE / "pipelines" / f"{TEXT_TO_IMAGE_MODULE}.py")


@functools.cache
def token_decoder_code() -> str:
    """The token decoder as one file."""
    return join_files(_PACKAGE / "modeling" / "modeling_lavit_token_decoder.py")


def pipeline_of(folder: Path) -> list[str]:
    """The pipeline that draws what a directory holds, as `model_index.json` names it: its file of code, and its class.

    With a language model and its processor, that is the one that draws prompts.
    """
    config = folder / "config.json"
    is_lavit = config.is_file() and read_json_object(config).get("model_type") == "lavit"
    if is_lavit and (folder / "processor_config.json").is_file():
        return [TEXT_TO_IMAGE_MODULE, TEXT_TO_IMAGE_CLASS]
    return [PIPELINE_MODULE, PIPELINE_CLASS]


def names_our_pipeline(folder: Path) -> bool:
    """Whether the `model_index.json` of a directory names a pipeline of this package by its file of code."""
    index = folder / "model_index.json"
    known = ([PIPELINE_MODULE, PIPELINE_CLASS], [TEXT_TO_IMAGE_MODULE, TEXT_TO_IMAGE_CLASS])
    return index.is_file() and read_json_object(index).get("_class_name") in known


def write_code(folder: Path) -> list[Path]:
    """Writes the files that diffusers needs into the directory of a pixel decoder; returns where they are."""
    code = {
        folder / f"{PIPELINE_MODULE}.py": pipeline_code(),
        folder / TOKEN_DECODER / f"{TOKEN_DECODER_MODULE}.py": token_decoder_code(),
    }
    if pipeline_of(folder)[0] == TEXT_TO_IMAGE_MODULE:
        code[folder / f"{TEXT_TO_IMAGE_MODULE}.py"] = text_to_image_code()
    for file, text in code.items():
        file.write_text(text, encoding="utf-8")
    return list(code)


# Copying and joining.


def copy_files(entries: Iterable[Path]) -> dict[str, str]:
    """Copies files of the package, and all that they import from it, to lie in one directory.

    Returns:
        Sources by name, with relative imports of siblings only.

    Raises:
        ValueError: If an import does not name a file, or two files have the same name.
    """
    files: dict[str, str] = {}
    for path in _with_imported(entries):
        if path.name in files:
            raise ValueError(f"{path}: another file that travels with it has this name, too; rename one.")
        code = re.sub(r"^( *from )\.[.\w]*?(\w+) import", r"\1.\2 import", path.read_text("utf-8"), flags=re.MULTILINE)
        files[path.name] = f"{_NOTICE}\n{code}"
    return files


def join_files(entry: Path) -> str:
    """Joins a file of the package with all that it imports from it; the source imports nothing of the package.

    Raises:
        ValueError: If a name means one thing in one file and another in the next, or an import cannot be left out.
    """
    imports: set[str] = set()
    meanings: dict[str, str] = {}
    bodies = []
    for path in _with_imported([entry]):
        text = path.read_text("utf-8")
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            if _is_left_out(node):
                del lines[node.lineno - 1 : node.end_lineno]
                continue
            if any(isinstance(inner, ast.ImportFrom) and inner.level for inner in ast.walk(node)):
                raise ValueError(f"{path}:{node.lineno}: imports of the package within functions cannot be left out.")
            for name, meaning in _bindings(node):
                if meanings.setdefault(name, meaning) != meaning:
                    raise ValueError(f"{path}:{node.lineno}: {name} means something else in a file to join.")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                del lines[node.lineno - 1 : node.end_lineno]
                imports.update(meaning for _, meaning in _bindings(node))
        bodies.append("\n".join(lines).strip("\n"))
    head = [_NOTICE, "", "from __future__ import annotations", "", *sorted(imports)]
    return "\n\n\n".join(["\n".join(head), *bodies]) + "\n"


def _with_imported(entries: Iterable[Path]) -> list[Path]:
    """The files, and those of the package that they import, also within functions; each after what it imports."""
    order: list[Path] = []
    seen: set[Path] = set()

    def visit(path: Path) -> None:
        if path in seen:
            return
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                visit(_imported_file(path, node))
        order.append(path)

    for entry in entries:
        visit(entry)
    return order


def _imported_file(path: Path, node: ast.ImportFrom) -> Path:
    file = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
    if node.module is None or any(alias.asname for alias in node.names) or not file.is_file():
        raise ValueError(f"{path}:{node.lineno}: `{ast.unparse(node)}` does not import names of a file as they are.")
    return file


def _is_left_out(node: ast.stmt) -> bool:
    """Whether a statement is the docstring, an import of the package, or only for those who import the file."""
    if isinstance(node, ast.ImportFrom):
        return bool(node.level) or node.module == "__future__"
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")


def _bindings(node: ast.stmt) -> list[tuple[str, str]]:
    """The names that a statement gives a meaning, and the meaning."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        source = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
        return [
            (alias.asname or alias.name.partition(".")[0], f"{source}import {ast.unparse(alias)}")
            for alias in node.names
        ]
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [(node.name, ast.unparse(node))]
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
    return [(name, ast.unparse(node)) for name in names]
