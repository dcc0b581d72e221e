"""`original/layout.json`: what is needed to write the original layout back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..utils.paths import resolve_inside
from .errors import ConversionError
from .weight_files import read_json

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

    def add_unused(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Records tensors of the side file, given as (file, name)."""
        for file, name in pairs:
            self.unused.setdefault(file, []).append(name)

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
            for name, dtype in file.tensors.items():
                if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                    raise ValueError(f"{path}: {name} has the type {dtype!r}")


def unused_key(file: str, name: str) -> str:
    """Name of a tensor in the side file."""
    return f"{file}/{name}"
