"""The original layout: read from disk, recorded in a converted directory, and written back."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..utils.paths import check_links, resolve_inside
from ..utils.progress import progress_bar
from . import names
from .mapping import original_shape, split
from .model_card import is_notice
from .weight_files import (
    ConversionError,
    TensorInfo,
    Weights,
    check_destination,
    check_space,
    complete_directory,
    find_weights,
    listing,
    read_json,
    write_file,
)

TEXT_CONFIG = "language_model/config.json"
TEXT_TOKENIZER = "language_model/tokenizer.model"

REQUIRED = (names.ENCODER, names.STAGE1, names.LANGUAGE_MODEL, names.STAGE2)
OPTIONAL = (names.LOWRES_DECODER, names.HIGHRES_DECODER, names.UNCONDITIONAL)

# Folder of the original -> folder of the converted directory. Everything in them is diffusers' or transformers' own.
PIXEL_DECODERS = {"highres_pixel_decoding": "", "pixel_decoding": "lowres"}
COMPONENTS = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor")
_NEEDED = ("unet", "vae", "scheduler")
_SMALL_FILES = {".json", ".txt", ".md", ".model", ".jinja"}


@dataclass
class Component:
    """A folder of a pixel decoder: a U-Net, a VAE, a scheduler, ... with its weights, if it has any."""

    folder: str
    target: str
    weights: Weights | None
    stem: str = ""
    other_files: list[str] = field(default_factory=list)


class OriginalCheckpoint:
    """A LaVIT checkpoint in its original layout.

    Attributes:
        weights: What each file of weights holds, by the file's name without its ending.
        components: The folders of the pixel decoders.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        _check_layout(self.root)
        check_links(self.root, ConversionError)
        found = {file: find_original(self.root, file) for file in (*REQUIRED, *OPTIONAL)}
        self.weights = {file: Weights(paths) for file, paths in found.items() if paths}
        self.components = [
            _component(self.root, f"{folder}/{name}")
            for folder in PIXEL_DECODERS
            for name in COMPONENTS
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

    def verify(self, progress: bool) -> None:
        """Compares the checksums that are stored in files of weights."""
        parts = [*self.weights.values(), *(part.weights for part in self.components if part.weights)]
        sizes = {file: path.stat().st_size for weights in parts for path, file in weights.files.items()}
        with progress_bar("Checking", sum(sizes.values()), progress) as bar:
            for file, size in sizes.items():
                file.verify()
                bar.update(size)

    def other_files(self) -> list[str]:
        """The small files outside the components: configurations, indices and the text tokenizer."""
        folders = ("language_model", "visual_tokenizer", *PIXEL_DECODERS)
        present = [folder for folder in folders if (self.root / folder).is_dir()]
        return [file for folder in present for file in _small_files(self.root, folder)]

    def notices(self) -> list[str]:
        """Licenses, notices and use policies at the root and in its folders; those of components are theirs."""
        folders = [".", *(path.name for path in sorted(self.root.iterdir()) if path.is_dir())]
        return [file for folder in folders for file in _notices(self.root, folder)]


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise ConversionError(f"{root} is not a directory." if root.exists() else f"{root} does not exist.")
    if (root / "config.json").is_file() and read_json(root / "config.json").get("model_type") == "lavit":
        raise ConversionError(f"{root} is converted already.")
    missing = [f"{file}.bin or .safetensors" for file in REQUIRED if not find_original(root, file)]
    missing += [file for file in (TEXT_CONFIG, TEXT_TOKENIZER) if not (root / file).is_file()]
    if missing:
        raise ConversionError(
            listing(f"{root} is not a complete LaVIT checkpoint in the original layout; missing:", missing)
        )


def find_original(root: Path, file: str) -> list[Path]:
    """Finds the weights of a file of the original layout, given without its ending; none if there are none."""
    path = root / file
    # transformers calls its pickles differently from its safetensors.
    return find_weights(path.parent, path.name, "pytorch_model" if file == names.LANGUAGE_MODEL else None)


def missing_of_pixel_decoders(root: Path) -> list[str]:
    """What pixel decoders lack that are there in part: they are converted, but nothing could be drawn by them."""
    missing = []
    for folder, decoder in zip(PIXEL_DECODERS, (names.HIGHRES_DECODER, names.LOWRES_DECODER), strict=True):
        if any((root / folder / name).is_dir() for name in COMPONENTS):
            missing += [f"{folder}/{name}" for name in _NEEDED if not (root / folder / name).is_dir()]
            missing += [] if find_original(root, decoder) else [f"{decoder}.bin or .safetensors"]
    return missing


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
    # Its licenses stay beside its weights: at the root, they would pass for those of the language model.
    files = [*_small_files(root, folder), *_notices(root, folder)]
    return Component(folder, component_target(folder), weights, stem, files)


def _small_files(root: Path, folder: str) -> list[str]:
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / folder).iterdir())
        if path.is_file() and path.suffix in _SMALL_FILES and not is_notice(path.name)
    ]


def _notices(root: Path, folder: str) -> list[str]:
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / folder).iterdir())
        if path.is_file() and is_notice(path.name)
    ]


# `original/layout.json`: what is needed to write the original layout back.


FOLDER = "original"
LAYOUT = f"{FOLDER}/layout.json"
UNUSED = "unused"
_VERSION = 1


@dataclass
class FileLayout:
    """A file of weights of the original.

    Attributes:
        weights: The model it belongs to: the file's name without ending and shard number, or a component's folder.
        tensors: Names in the order of the file, with their dtypes.
        bare: Whether the file is a pickle of one tensor without a name.
    """

    weights: str
    tensors: dict[str, str]
    bare: bool = False


@dataclass
class Layout:
    """The original layout.

    Attributes:
        dtype: What tensors were cast to, if they were.
        files: The files of weights.
        unused: The tensors to be found in the side file, by file (as in `FileLayout.weights`).
        copied: The other files, and where they are in the converted directory.
    """

    dtype: str | None = None
    files: dict[str, FileLayout] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Writes the record into a converted directory."""
        path = root / LAYOUT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Layout:
        """Reads the record of a converted directory."""
        if not (root / LAYOUT).is_file():
            raise ConversionError(
                f"{root} has no {LAYOUT}: only a directory written by `lavit convert` can be converted back."
            )
        content = read_json(root / LAYOUT)
        if content.pop("version", None) != _VERSION:
            raise ConversionError(f"{root / LAYOUT} was written by another version of this library.")
        try:
            for name in ("files", "unused", "copied"):
                _check_object(content.get(name, {}), f"`{name}`")
            files = {path: FileLayout(**entry) for path, entry in content.pop("files").items()}
            layout = cls(files=files, **content)
            layout._check(root)
            return layout
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ConversionError(f"{root / LAYOUT} is damaged: {error}") from error

    def _check(self, root: Path) -> None:
        """Makes sure that no path leads out of the directory, be it read there or written elsewhere.

        Raises:
            ValueError: One does, or something else is none of what `save` writes.
        """
        weights = [file.weights for file in self.files.values()]
        for path in (*self.files, *self.copied, *self.copied.values(), *weights, *self.unused.keys()):
            resolve_inside(root, path, "it")
            # Of a path that leads up and down again, the directory that it is written to may make something else.
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{path} is no path within a directory")
        for path, file in self.files.items():
            _check_object(file.tensors, f"`tensors` of {path}")
            for name, dtype in file.tensors.items():
                if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                    raise ValueError(f"{path}: {name} has the type {dtype!r}")


def _check_object(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} has to be an object of names and values, and is {value!r:.50}")


def unused_key(file: str, name: str) -> str:
    """Name of a tensor in the side file."""
    return f"{file}/{name}"


# The way back.


def convert_to_original(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Writes a converted checkpoint in the layout it was converted from.

    Args:
        src: A directory written by `convert`. Its weights may have been trained further.
        dst: Directory to create. It appears only when it is complete.
        progress: Whether to show a progress bar.

    Returns:
        The created directory. Unless a dtype was given to `convert` or the weights were changed, every tensor equals
        the original's bit by bit.
    """
    source, destination = Path(src), Path(dst)
    check_destination(destination)
    reader = _ConvertedReader(source)
    total = reader.check()
    check_space(destination, total)
    with complete_directory(destination) as folder, progress_bar("Writing", total, progress) as bar:
        for path, file in reader.layout.files.items():
            tensors = {name: reader.read(file, name) for name in file.tensors}
            _write(folder / path, tensors, file.bare)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
        for path, converted in reader.layout.copied.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / converted, folder / path)
    return destination


_BRANCHES = (names.STAGE1, names.STAGE2)


class _ConvertedReader:
    """Finds the original's tensors in a converted directory."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ConversionError(f"{root} is not a directory.")
        self.root = root
        self.layout = Layout.load(root)
        check_links(root, ConversionError)
        self._weights: dict[Path, Weights] = {}
        self._add_second_branch()

    def _add_second_branch(self) -> None:
        """Gives stage 2 tensors that it took from stage 1, where training has made them others.

        The original loads its file of stage 2 over that of stage 1, so what is there is what it reads pictures with.
        """
        weights = self._open(self.root / names.MODEL, "model")
        files = {file: [part for part in self.layout.files.values() if part.weights == file] for file in _BRANCHES}
        if weights is None or not all(files.values()):
            return
        stage1, stage2 = ({name: part for part in files[file] for name in part.tensors} for file in _BRANCHES)
        for target in weights.headers:
            if not target.startswith(names.CONTINUOUS_BRANCH):
                continue
            origins = [origin.name for origin in names.origins_of(names.MODEL, target) if origin.file == names.STAGE2]
            taken = [name for name in origins if name in stage1 and name not in stage2]
            shared = target.replace("continuous", "discrete", 1)
            if not taken or (shared in weights.headers and torch.equal(weights.read(target), weights.read(shared))):
                continue
            for name in taken:
                files[names.STAGE2][0].tensors[name] = stage1[name].tensors[name]

    def check(self) -> int:
        """Names everything that is missing, and returns the bytes to write."""
        total, missing = 0, []
        for file in self.layout.files.values():
            for name, dtype in file.tensors.items():
                weights, key, mark = self._locate(file, name)
                if weights is None or key not in weights.headers:
                    missing.append(f"{file.weights}: {name} (from {key})")
                else:
                    shape = original_shape(weights.headers[key].shape, mark)
                    total += torch.Size(shape).numel() * self._dtype(dtype, weights.dtype(key)).itemsize
        missing += [path for path in self.layout.copied.values() if not (self.root / path).is_file()]
        if missing:
            raise ConversionError(listing(f"{self.root} is not complete; missing:", missing))
        return total

    def read(self, file: FileLayout, name: str) -> torch.Tensor:
        """Returns a tensor as the original has it."""
        weights, key, mark = self._locate(file, name)
        assert weights is not None
        tensor = split(weights.read(key), mark)
        return tensor.to(self._dtype(file.tensors[name], tensor.dtype))

    def _dtype(self, original: str, stored: torch.dtype) -> torch.dtype:
        # Two biases of different dtypes were packed in the wider one.
        return stored if self.layout.dtype else getattr(torch, original)

    def _locate(self, file: FileLayout, name: str) -> tuple[Weights | None, str, str]:
        """Where a tensor is: weights, name and mark."""
        if name in self.layout.unused.get(file.weights, []):
            return self._open(self.root / FOLDER, UNUSED), unused_key(file.weights, name), ""
        if file.weights != names.UNCONDITIONAL and file.weights.partition("/")[0] in PIXEL_DECODERS:
            folder = self.root / component_target(file.weights)
            return self._open(folder, find_component_weights(folder)[1]), name, ""
        slots = names.slots_of(file.weights, name)
        # A tensor that goes to several places is the same in all; the codebook's first place is the tokenizer.
        slot = next((slot for slot in slots if not slot.model), slots[0] if slots else None)
        if slot is None:
            return None, name, ""
        return self._open(self.root / slot.model, "model"), slot.target, slot.mark

    def _open(self, folder: Path, stem: str) -> Weights | None:
        key = folder / stem
        if key not in self._weights:
            paths = find_weights(folder, stem) if stem else []
            if not paths:
                return None
            self._weights[key] = Weights(paths)
        return self._weights[key]


def _write(path: Path, tensors: dict[str, torch.Tensor], bare: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        write_file(path, tensors)
    else:
        torch.save(next(iter(tensors.values())) if bare else tensors, path)
