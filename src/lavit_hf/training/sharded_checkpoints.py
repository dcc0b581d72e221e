"""State that lies in parts in a checkpoint, as processes write it that each hold a part of it.

FSDP2 writes directories of `torch.distributed.checkpoint`, which any number of processes read; DeepSpeed writes files
for every process. Both are read by their libraries with all the code that may be in them: what is in them is looked at
before, and is data alone (FSDP2), or has to be trusted (DeepSpeed).
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.trainer_pt_utils import safe_globals

from ..utils.paths import resolve_inside

_METADATA = ".metadata"  # a pickle: what is in the directory, and where
_TORCH = "torch.distributed.checkpoint."
# What torch writes into that pickle.
_NAMES = {
    *((_TORCH + "metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_TORCH + "metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_TORCH + "metadata", name) for name in ("TensorProperties", "ChunkStorageMetadata")),
    (_TORCH + "filesystem", "_StorageInfo"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_DEEPSPEED_PART = re.compile(r".*zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")


class _UnsafeError(ValueError):
    """Loading would, or might, run code."""


class _Part(NamedTuple):
    """A piece of a file in such a directory, and whether torch unpickles it as anything but a tensor."""

    file: Path
    offset: int
    length: int
    is_pickle: bool

    def read(self) -> io.BytesIO:
        """Its content."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


def sharded_directories(checkpoint: Path) -> list[Path]:
    """Where torch would look for sharded state."""
    found = [path for pattern in ("*.metadata", "*.distcp") for path in checkpoint.glob(pattern)]
    found += [path for pattern in ("*/*.metadata", "*/*.distcp") for path in checkpoint.glob(pattern)]
    return sorted({path.parent for path in found})


def why_shards_are_incomplete(checkpoint: Path) -> str | None:
    """What the sharded state of a checkpoint lacks; `None` if nothing, or if it is to be refused in any case."""
    for folder in sharded_directories(checkpoint):
        try:
            for part in _read_parts(folder):
                if not part.file.is_file() or part.file.stat().st_size < part.offset + part.length:
                    return f"{part.file.relative_to(checkpoint)} is missing or damaged"
        except _UnsafeError:
            return None
        except (OSError, ValueError) as error:
            return f"{folder.relative_to(checkpoint) / _METADATA} is missing or damaged ({error!s:.100})"
    return None


def require_harmless_shards(checkpoint: Path) -> None:
    """Checks that sharded state of torch is data alone, and lies in its directory.

    Raises:
        ValueError: It is something else, or damaged.
    """
    for folder in sharded_directories(checkpoint):
        try:
            if others := [path for path in folder.glob("*.metadata") if path.name != _METADATA]:
                raise _UnsafeError(f"{others[0].name} is read where {_METADATA} is not")
            for part in _read_parts(folder):
                if part.is_pickle and not is_data(part.read()):
                    raise _UnsafeError(f"{part.file.name} holds more than data")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is not loaded, as whatever code is in it would run: {error}. Resume from another "
                "checkpoint, or trust this one (--trust_checkpoint) if you know who wrote it."
            ) from None  # the cause of an error in a pickle is of the choice of whoever wrote it


def is_data(file: Path | io.BytesIO, mmap: bool = False) -> bool:
    """Whether `Trainer` can load a file of torch, which it does with `weights_only=True`."""
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception:  # a broken pickle raises anything; and torch's own words advise to load what is refused
        return False
    return True


def _read_parts(folder: Path) -> list[_Part]:
    """What a directory says that it holds.

    Raises:
        _UnsafeError: Its pickle may do something else than say that.
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    try:
        with (folder / _METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        return list(_list_parts(folder, metadata))
    except (OSError, ValueError):
        raise
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{_METADATA} cannot be read") from error


def _list_parts(folder: Path, metadata: Any) -> Iterator[_Part]:
    kinds = metadata.state["state_dict_metadata"]
    for index, info in metadata.state["storage_data"].items():
        name, state = index.state["fqn"], info.state
        if type(name) is not str or state.get("transform_descriptors"):
            raise _UnsafeError(f"{_METADATA} is not of the form that torch writes")
        file = resolve_inside(folder, state["relative_path"], _METADATA, _UnsafeError)
        offset, length = state["offset"], state["length"]
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise ValueError(f"{_METADATA} names {offset!r:.20} and {length!r:.20} as offset and length")
        yield _Part(file, offset, length, type(kinds.get(name)).__name__ != "TensorStorageMetadata")


class _Recorded:
    """Stands for an object of torch: remembers what it would be made of, and does nothing."""

    state: dict[str, Any]

    def __new__(cls, *args: Any) -> _Recorded:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        # As a pair, it would set attributes by name, such as the class of the object.
        is_of_tensor = type(self).__name__ == "TensorProperties" and isinstance(state, tuple) and len(state) == 5
        if not isinstance(state, dict) and not is_of_tensor:
            raise _UnsafeError(f"{_METADATA} is not of the form that torch writes")
        if isinstance(state, dict):
            self.state |= state


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata` without the classes that it names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> type:
        """A class that stands for the named one."""
        if (module, name) not in _NAMES:
            raise _UnsafeError(f"{_METADATA} names {module}.{name}")
        return self._classes.setdefault((module, name), type(name, (_Recorded,), {}))


def find_deepspeed_folders(checkpoint: str | os.PathLike[str]) -> list[Path]:
    """Where DeepSpeed wrote its state in a checkpoint."""
    return sorted(path for path in Path(checkpoint).glob("global_step*") if path.is_dir())


def require_same_sharding(
    checkpoint: Path, world_size: int, fsdp_state: str | None = None, is_deepspeed: bool = False
) -> None:
    """Checks that a run can go on from the state of a checkpoint.

    Args:
        checkpoint: Its directory.
        world_size: Number of processes of the run.
        fsdp_state: With FSDP, which state it saves: `"FULL_STATE_DICT"` or `"SHARDED_STATE_DICT"`.
        is_deepspeed: Whether it trains with DeepSpeed.

    Raises:
        ValueError: It cannot; the message says how it can.
    """
    deepspeed, directories = find_deepspeed_folders(checkpoint), sharded_directories(checkpoint)
    if is_deepspeed != bool(deepspeed):
        raise ValueError(
            f"{checkpoint} was saved {'with' if deepspeed else 'without'} DeepSpeed, and this run trains "
            f"{'without' if deepspeed else 'with'} it. Go on as it was begun, or start a new run from its weights "
            "(--model)."
        )
    if deepspeed:
        tag = (checkpoint / "latest").read_text(encoding="utf-8") if (checkpoint / "latest").is_file() else ""
        if tag not in [folder.name for folder in deepspeed]:
            raise ValueError(f"{checkpoint / 'latest'} names none of the directories of DeepSpeed beside it.")
        parts = [path for path in (checkpoint / tag).iterdir() if _DEEPSPEED_PART.fullmatch(path.name)]
        if len(parts) != world_size:
            raise ValueError(
                f"{checkpoint} holds DeepSpeed's state of {len(parts)} processes, and this run has {world_size}: "
                "DeepSpeed goes on with as many only. Start as many, or a new run from its weights (--model). FSDP2 "
                "(examples/accelerate/fsdp2.yaml) goes on with any number."
            )
        return
    saved = None
    if directories:
        saved = "SHARDED_STATE_DICT"
    elif (checkpoint / "pytorch_model_fsdp.bin").is_file():
        saved = "FULL_STATE_DICT"
    if saved == fsdp_state:
        return
    if saved is None:
        raise ValueError(
            f"{checkpoint} was saved without FSDP, and this run trains with it. Go on as it was begun, or start a new "
            "run from its weights (--model)."
        )
    if fsdp_state is None:
        raise ValueError(
            f"{checkpoint} was saved by FSDP, and this run trains without it. Start it with `accelerate launch "
            "--config_file examples/accelerate/fsdp2.yaml`, in any number of processes, also a single one "
            "(--num_processes 1)."
        )
    raise ValueError(
        f"{checkpoint} holds state as of fsdp_state_dict_type: {saved}, and this run has {fsdp_state}. Set it to "
        f"{saved} in the configuration file of accelerate."
    )
