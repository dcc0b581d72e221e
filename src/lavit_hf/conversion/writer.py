"""Writes the tensors of a converted directory, and the record of the original layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..utils.progress import Progress
from .configs import Configs
from .layout import FOLDER, UNUSED, FileLayout, Layout, unused_key
from .mapping import CheckpointMapping, Target
from .notices import copy_notices
from .shards import write_sharded
from .source import Component, OriginalCheckpoint
from .tensors import cast_dtype, dtype_name, join
from .weight_files import Weights


class ConvertedWriter:
    """Writes everything that holds tensors, and the record of the original layout.

    Args:
        source: The original checkpoint.
        configs: The configurations of the models.
        mapping: Which tensor goes where.
        cast: What the model and the token decoders are cast to; `None` keeps them as stored.
        max_shard_size: Largest size of a file of weights.
    """

    def __init__(
        self,
        source: OriginalCheckpoint,
        configs: Configs,
        mapping: CheckpointMapping,
        cast: torch.dtype | None,
        max_shard_size: int | str,
    ):
        self.source = source
        self.configs = configs
        self.mapping = mapping
        self.cast = cast
        self.max_shard_size = max_shard_size
        self.layout = Layout(dtype=dtype_name(cast) if cast else None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors to write."""
        unused = sum(_stored_bytes(self.source.weights[file], name) for file, name in self.mapping.unused)
        models = sum(self._size(target) for targets in self.mapping.models.values() for target in targets.values())
        parts = [component.weights for component in self.source.components if component.weights]
        return unused + models + sum(_stored_bytes(weights, name) for weights in parts for name in weights.headers)

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes into an empty directory."""
        for model in self.mapping.models:
            self._write_model(folder, model, progress)
        for component in self.source.components:
            self._write_component(folder, component, progress)
        self._write_unused(folder, progress)
        for file, weights in self.source.weights.items():
            self._record(file, weights)
        for file in self.source.other_files():
            self._copy(folder, file, f"{FOLDER}/{file}")
        self.layout.copied.update(copy_notices(self.source, folder))
        self.layout.save(folder)

    def _write_model(self, folder: Path, model: str, progress: Progress) -> None:
        targets = self.mapping.models[model]
        config = self.configs.token_decoders[model] if model else self.configs.model
        if self.cast:
            _set_dtype(config, self.cast)
        config.save_pretrained(folder / model)
        sizes = {name: self._size(target) for name, target in targets.items()}
        write_sharded(
            folder / model, "model", sizes, lambda name: self._assemble(targets[name]), self.max_shard_size, progress
        )

    def _assemble(self, target: Target) -> torch.Tensor:
        tensor = join([(origin.mark, self.source.read(origin.file, origin.name)) for origin in target.origins])
        return tensor.to(cast_dtype(tensor.dtype, self.cast))

    def _write_component(self, folder: Path, component: Component, progress: Progress) -> None:
        if component.weights:
            weights = component.weights
            sizes = {name: _stored_bytes(weights, name) for name in weights.headers}
            target = folder / component.target
            write_sharded(target, component.stem, sizes, weights.read, self.max_shard_size, progress)
            self._record(component.folder, weights)
        for file in component.other_files:
            # An index of the source's shards would mislead whoever loads the new ones.
            beside = f"{component.target}/{Path(file).name}"
            self._copy(folder, file, f"{FOLDER}/{file}" if file.endswith(".index.json") else beside)

    def _write_unused(self, folder: Path, progress: Progress) -> None:
        pairs = {unused_key(*pair): pair for pair in self.mapping.unused}
        if pairs:
            sizes = {key: _stored_bytes(self.source.weights[file], name) for key, (file, name) in pairs.items()}
            write_sharded(
                folder / FOLDER,
                UNUSED,
                sizes,
                lambda key: self.source.read(*pairs[key]),
                self.max_shard_size,
                progress,
            )
            self.layout.add_unused(pairs.values())

    def _record(self, key: str, weights: Weights) -> None:
        for path, tensor_names in weights.names_by_path():
            dtypes = {name: dtype_name(weights.dtype(name)) for name in tensor_names}
            bare = weights.files[path].holds_bare_tensor
            self.layout.files[path.relative_to(self.source.root).as_posix()] = FileLayout(key, dtypes, bare)

    def _copy(self, folder: Path, file: str, target: str) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source.root / file, folder / target)
        self.layout.copied[file] = target

    def _size(self, target: Target) -> int:
        assert target.dtype is not None
        return torch.Size(target.shape).numel() * cast_dtype(target.dtype, self.cast).itemsize


def _stored_bytes(weights: Weights, name: str) -> int:
    return weights.headers[name].numel * weights.dtype(name).itemsize


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for part in getattr(config, "sub_configs", {}):
        _set_dtype(getattr(config, part), dtype)
