"""The original layout on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..utils.paths import check_links
from ..utils.progress import Progress
from . import names
from .errors import ConversionError, listing
from .weight_files import TensorInfo, Weights, find_weights, read_json

LANGUAGE_MODEL_FOLDER = "language_model"
TEXT_CONFIG = f"{LANGUAGE_MODEL_FOLDER}/config.json"
TEXT_TOKENIZER = f"{LANGUAGE_MODEL_FOLDER}/tokenizer.model"

_REQUIRED = (names.ENCODER, names.STAGE1, names.LANGUAGE_MODEL, names.STAGE2)
_OPTIONAL = (names.LOWRES_DECODER, names.HIGHRES_DECODER, names.UNCONDITIONAL)

# Folder of the original -> folder of the converted directory. Everything in them is diffusers' or transformers' own.
PIXEL_DECODERS = {"highres_pixel_decoding": "", "pixel_decoding": "lowres"}
_COMPONENTS = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor")
_SMALL_FILES = {".json", ".txt", ".md", ".model", ".jinja"}
_NOTICES = ("license", "licence", "notice", "use_policy", "use-policy")


@dataclass
class Component:
    """A folder of a pixel decoder: a U-Net, a VAE, a scheduler, ... with its weights, if it has any."""

    folder: str
    target: str
    weights: Weights | None
    stem: str = ""
    other_files: list[str] = field(default_factory=list)


class OriginalCheckpoint:
    """A LaVIT checkpoint in the layout of its release.

    Args:
        root: Its directory.

    Attributes:
        weights: What each file of weights holds, by the file's name without its ending.
        components: The folders of the pixel decoders.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        _check_layout(self.root)
        refuse_links_out(self.root)
        self.weights = {file: Weights(paths) for file, paths in _weight_files(self.root).items()}
        self.components = [
            _component(self.root, f"{folder}/{name}")
            for folder in PIXEL_DECODERS
            for name in _COMPONENTS
            if (self.root / folder / name).is_dir()
        ]

    @property
    def headers(self) -> dict[str, dict[str, TensorInfo]]:
        """Every tensor of the original's own files, by file and name."""
        return {file: weights.headers for file, weights in self.weights.items()}

    @property
    def text_config(self) -> dict:
        """The language model's configuration as stored."""
        return read_json(self.root / TEXT_CONFIG)

    def read(self, file: str, name: str) -> torch.Tensor:
        """Reads one tensor."""
        return self.weights[file].read(name)

    def all_weights(self) -> list[Weights]:
        """Everything that holds tensors."""
        return [*self.weights.values(), *(part.weights for part in self.components if part.weights)]

    def verify(self, progress: Progress) -> None:
        """Compares stored checksums, reporting the bytes of each file."""
        for weights in self.all_weights():
            for path, file in weights.files.items():
                file.verify()
                progress(path.stat().st_size)

    def other_files(self) -> list[str]:
        """The small files outside the components: configurations, indices and the text tokenizer."""
        folders = (LANGUAGE_MODEL_FOLDER, "visual_tokenizer", *PIXEL_DECODERS)
        return [
            file for folder in folders if (self.root / folder).is_dir() for file in _small_files(self.root, folder)
        ]

    def notices(self) -> list[str]:
        """Licenses, notices and use policies at the root and in the known folders."""
        folders = [self.root, *(path for path in sorted(self.root.iterdir()) if path.is_dir())]
        return [
            path.relative_to(self.root).as_posix()
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name.lower().startswith(_NOTICES)
        ]


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise ConversionError(f"{root} is not a directory." if root.exists() else f"{root} does not exist.")
    if (root / "config.json").is_file() and read_json(root / "config.json").get("model_type") == "lavit":
        raise ConversionError(f"{root} is converted already.")
    missing = [f"{file}.bin or .safetensors" for file in _REQUIRED if not _find(root, file)]
    missing += [file for file in (TEXT_CONFIG, TEXT_TOKENIZER) if not (root / file).is_file()]
    if missing:
        raise ConversionError(
            listing(f"{root} is not a complete LaVIT checkpoint in the original layout; missing:", missing)
        )


def refuse_links_out(root: Path) -> None:
    """Refuses a source with links to files elsewhere, which would be passed on with the result."""
    try:
        check_links(root)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _weight_files(root: Path) -> dict[str, list[Path]]:
    found = {file: _find(root, file) for file in (*_REQUIRED, *_OPTIONAL)}
    return {file: paths for file, paths in found.items() if paths}


def _find(root: Path, file: str) -> list[Path]:
    path = root / file
    # transformers calls its pickles differently from its safetensors.
    return find_weights(path.parent, path.name, "pytorch_model" if file == names.LANGUAGE_MODEL else None)


def find_component_weights(folder: Path) -> tuple[list[Path], str]:
    """Finds the weights of a model of diffusers or transformers: the files, and their common stem as safetensors."""
    for stem, pickle_stem in (("diffusion_pytorch_model", "diffusion_pytorch_model"), ("model", "pytorch_model")):
        if paths := find_weights(folder, stem, pickle_stem):
            return paths, stem
    return [], ""


def component_target(folder: str) -> str:
    """Where a component's folder of the original goes in the converted directory."""
    decoder, _, name = folder.partition("/")
    return f"{PIXEL_DECODERS[decoder]}/{name}".lstrip("/")


def _component(root: Path, folder: str) -> Component:
    paths, stem = find_component_weights(root / folder)
    weights = Weights(paths) if paths else None
    return Component(folder, component_target(folder), weights, stem, _small_files(root, folder))


def _small_files(root: Path, folder: str) -> list[str]:
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / folder).iterdir())
        if path.is_file() and path.suffix in _SMALL_FILES and not path.name.lower().startswith(_NOTICES)
    ]
