"""Writes the original layout back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..utils.progress import progress_bar
from . import names
from .atomic import check_destination, check_space, complete_directory, write_error
from .errors import ConversionError, listing
from .layout import FOLDER, UNUSED, FileLayout, Layout, unused_key
from .mapping import original_shape
from .shards import write_file
from .source import PIXEL_DECODERS, component_target, find_component_weights, refuse_links_out
from .tensors import split
from .weight_files import Weights, find_weights


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


class _ConvertedReader:
    """Finds the original's tensors in a converted directory."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ConversionError(f"{root} is not a directory.")
        self.root = root
        self.layout = Layout.load(root)
        refuse_links_out(root)
        self._weights: dict[Path, Weights] = {}

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
        return
    try:
        torch.save(next(iter(tensors.values())) if bare else tensors, path)
    except RuntimeError as error:  # torch's way of saying that a write failed
        raise write_error(error, path) from error
