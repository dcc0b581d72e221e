"""Weights on disk, read and written one tensor or shard at a time, in directories that are there when complete."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.atomic_files import complete_folder, new_file_mode, readable_size, write_failure, write_json
from ..utils.json_files import read_json_object
from ..utils.paths import resolve_inside
from ..utils.progress import Progress
from ..utils.safetensors_files import read_index


class ConversionError(ValueError):
    """The source, the destination or an option does not allow the conversion. The message is meant for the user."""


def listing(title: str, lines: Iterable[str]) -> str:
    """Formats `lines` as an indented list below `title`."""
    return "\n".join([title, *(f"  {line}" for line in lines)])


# Where weights are written.


# Configurations, tokenizer and notices; far more than they need.
_MARGIN = 32 * 2**20


def check_destination(destination: Path) -> None:
    """Refuses a destination that would be overwritten."""
    if destination.is_dir():
        if any(destination.iterdir()):
            raise ConversionError(f"{destination} exists and is not empty; choose another destination or remove it.")
    elif destination.exists() or destination.is_symlink():
        raise ConversionError(f"{destination} exists and is not a directory.")


def check_space(destination: Path, needed: int) -> None:
    """Refuses to start if the disk of `destination` has less than `needed` bytes left."""
    existing = next(folder for folder in (destination, *destination.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed + _MARGIN > free:
        raise ConversionError(
            f"{destination} needs {readable_size(needed + _MARGIN)}, but only {readable_size(free)} are free there."
        )


@contextmanager
def complete_directory(destination: Path) -> Iterator[Path]:
    """As `complete_folder`, with errors for the user."""
    check_destination(destination)
    destination = destination.resolve()
    try:
        with complete_folder(destination) as partial:
            yield partial
    except Exception as error:
        if (failure := write_failure(error, destination)) is not None:
            free = shutil.disk_usage(destination.parent).free
            raise ConversionError(f"{failure} ({readable_size(free)} free).") from error
        if isinstance(error, OSError):  # something could not be read, and the message says what
            raise ConversionError(str(error)) from error
        raise


# Reading.


# Pages of a memory-mapped file count as this process's memory until the mapping goes. So a file is opened anew after
# this many bytes were handed out.
_REOPEN_AFTER = 32 * 2**20

_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it. `dtype` is `None` in a manifest."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    path: Path | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class WeightFile:
    """One file of weights: a pickle of a state dict (or of a bare tensor) or safetensors."""

    def __init__(self, path: Path):
        self.path = path
        self.is_safetensors = path.suffix == ".safetensors"
        self.holds_bare_tensor = False
        # Files of torch < 1.6 are no zip archives: they cannot be mapped and have no checksums.
        self._is_mapped = self.is_safetensors or zipfile.is_zipfile(path)
        self._handle: Any = None
        self._handed_out = 0

    def headers(self) -> dict[str, TensorInfo]:
        """Names, shapes and dtypes of the tensors, in the order of the file."""
        handle = self._open()
        if not self.is_safetensors:
            return {name: TensorInfo(tuple(t.shape), t.dtype, self.path) for name, t in handle.items()}
        headers = {}
        with _named_errors(self.path):
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                if (dtype := _DTYPES.get(part.get_dtype())) is None:
                    raise ConversionError(f"{self.path}: {name} has the type {part.get_dtype()}, not a supported one.")
                headers[name] = TensorInfo(tuple(part.get_shape()), dtype, self.path)
        return headers

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor; its memory is the mapped file's where possible."""
        if self._is_mapped and self._handed_out > _REOPEN_AFTER:
            self.close()
        handle = self._open()
        tensor = handle.get_tensor(name) if self.is_safetensors else handle[name]
        self._handed_out += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Lets go of the file. Tensors that were handed out stay valid."""
        self._handle = None
        self._handed_out = 0

    def verify(self) -> None:
        """Compares the checksums that torch stores beside every tensor of a pickle but does not look at itself."""
        if self.is_safetensors or not self._is_mapped:
            return
        with zipfile.ZipFile(self.path) as archive:
            for record in archive.infolist():
                # 0: written with torch.serialization.set_crc32_options(False)
                if record.CRC != 0 and not _is_intact(archive, record):
                    raise ConversionError(f"{self.path} is corrupt: the checksum of {record.filename} does not match.")

    def _open(self) -> Any:
        if self._handle is None:
            with _named_errors(self.path):
                self._handle = safe_open(self.path, framework="pt") if self.is_safetensors else self._open_pickle()
            self._handed_out = 0
        return self._handle

    def _open_pickle(self) -> dict[str, torch.Tensor]:
        content = torch.load(self.path, map_location="cpu", mmap=self._is_mapped, weights_only=True)
        if isinstance(content, torch.Tensor):
            self.holds_bare_tensor = True
            content = {self.path.stem: content}
        if not isinstance(content, Mapping):
            raise ConversionError(f"{self.path} holds a {type(content).__name__} instead of named tensors.")
        if strange := [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]:
            raise ConversionError(f"{self.path} holds entries that are no tensors: {', '.join(strange)}.")
        return {str(name): tensor.detach() for name, tensor in content.items()}


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns whatever the readers raise on a broken file into an error that names the file."""
    try:
        yield
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ConversionError(
                f"{path} holds more than tensors and plain containers; such pickles can run code and are refused."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{path} is corrupt or truncated ({reason[:160]}).") from error


class Weights:
    """The tensors of one model, from one file or several."""

    def __init__(self, paths: list[Path]):
        self.files = {path: WeightFile(path) for path in paths}
        self.headers: dict[str, TensorInfo] = {}
        self._current: Path | None = None
        twice: Counter[str] = Counter()
        for file in self.files.values():
            headers = file.headers()
            twice.update(self.headers.keys() & headers.keys())
            self.headers.update(headers)
            file.close()
        if twice:
            raise ConversionError(listing(f"{paths[0].parent}: tensors in more than one shard:", sorted(twice)))

    def read(self, name: str) -> torch.Tensor:
        """Returns tensor `name`."""
        path = self.headers[name].path
        assert path is not None
        if path != self._current:
            for file in self.files.values():
                file.close()
            self._current = path
        return self.files[path].read(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype tensor `name` is stored in."""
        dtype = self.headers[name].dtype
        assert dtype is not None
        return dtype

    def nbytes(self, name: str) -> int:
        """The bytes that tensor `name` takes as it is stored."""
        return self.headers[name].numel * self.dtype(name).itemsize


def find_weights(folder: Path, safetensors_stem: str, pickle_stem: str | None = None) -> list[Path]:
    """Finds a model's weights: safetensors before pickles, with an index, in one file, or in shards without an index.

    The stems are names of files without their ending, such as `model` and `pytorch_model`.
    """
    for stem, ending in ((safetensors_stem, "safetensors"), (pickle_stem or safetensors_stem, "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return _indexed_shards(index)
        if (single := folder / f"{stem}.{ending}").is_file():
            return [single]
        if shards := sorted(path for path in folder.glob(f"{stem}-*.{ending}") if _SHARD.search(path.stem)):
            return _complete_shards(shards)
    return []


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, see [`read_json_object`]."""
    return read_json_object(path, ConversionError)


def _indexed_shards(index: Path) -> list[Path]:
    names = sorted(read_index(index, ConversionError))
    shards = [resolve_inside(index.parent, name, str(index), ConversionError) for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ConversionError(listing(f"{index} lists shards that are missing:", missing))
    return shards


def _complete_shards(shards: list[Path]) -> list[Path]:
    match = _SHARD.search(shards[-1].stem)
    if match and int(match[2]) != len(shards):
        raise ConversionError(f"{shards[0].parent}: {len(shards)} of {int(match[2])} shards ({shards[0].name}, ...).")
    return shards


def _is_intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as stream:
            while stream.read(2**22):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
    return True


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Writing.


def write_sharded(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
    progress: Progress,
) -> None:
    """Writes tensors as `stem.safetensors`, or as shards with an index, in the format of transformers and diffusers.

    Only the tensors of one shard are held at a time. They are written in the order of `sizes`, which are in bytes;
    `progress` is told those of every written shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = _split(sizes, stem, max_shard_size)
    for filename, tensor_names in split.filename_to_tensors.items():
        write_file(folder / filename, _hold(tensor_names, read))
        progress(sum(sizes[name] for name in tensor_names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index, sort_keys=True)


def check_shard_size(max_shard_size: int | str) -> None:
    """Refuses a size that cannot be understood."""
    try:
        _split({"tensor": 1}, "model", max_shard_size)
    except ValueError as error:
        raise ConversionError(f"The largest size of a shard has to look like 5GB: {error}") from error


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one file of safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(new_file_mode(0o666))  # safetensors makes its files private to their owner


def _split(sizes: Mapping[str, int], stem: str, max_shard_size: int | str) -> StateDictSplit:
    return split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _hold(tensor_names: list[str], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads the tensors of a shard. safetensors takes neither gaps nor two names for one memory."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in tensor_names:
        tensor = read(name).contiguous()
        if (tensor.numel() and tensor.data_ptr() in seen) or tensor.nbytes != tensor.untyped_storage().nbytes():
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors
