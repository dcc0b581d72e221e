"""Converts a checkpoint in the original layout to one directory that `from_pretrained` loads."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import GenerationConfig

from ..modeling.checkpoint_files import Shapes, built_from, check_counts, differing_shapes, state_shapes
from ..modeling.configuration_lavit import LavitConfig
from ..pipelines.pixel_decoder_files import save_pipelines
from ..utils.progress import Progress, progress_bar
from . import names
from .configs import Configs, infer_configs, set_dtype
from .mapping import CheckpointMapping, Target, join, map_checkpoint
from .model_card import copy_notices, save_model_card
from .original import FOLDER, TEXT_TOKENIZER, UNUSED, Component, FileLayout, Layout, OriginalCheckpoint, unused_key
from .weight_files import (
    ConversionError,
    Weights,
    check_destination,
    check_shard_size,
    check_space,
    complete_directory,
    listing,
    read_json,
    write_sharded,
)

if TYPE_CHECKING:
    from ..processing.processing_lavit import ImageTextProcessor


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    heads: Mapping[str, int] | str | None = None,
    progress: bool = True,
) -> Path:
    """Converts a checkpoint in the original layout.

    Args:
        src: Directory with `visual_tokenizer/`, `language_model/` and, optionally, the pixel decoders.
        dst: Directory to create. It appears only when it is complete.
        dtype: Casts the model and the token decoders; by default every tensor stays as stored.
        max_shard_size: Largest size of a file of weights. About this much memory is needed.
        heads: Numbers of attention heads, as in `"vision=16,merger=16,decoder=16"`; needed unless the vision width is
            the published one.
        progress: Whether to show progress bars.

    Returns:
        The created directory.

    Raises:
        ConversionError: The source is incomplete, broken or of other dimensions, or the destination cannot be written.
    """
    destination = Path(dst)
    check_destination(destination)
    check_shard_size(max_shard_size)
    cast = resolve_dtype(dtype)
    source = OriginalCheckpoint(src)
    configs = infer_configs(source.headers, source.text_config, heads)
    mapping = map_checkpoint(source.headers, configs)
    check_components(source)
    processor = build_processor(source, configs.model)
    source.verify(progress)
    settle_overridden(source, mapping)
    writer = ConvertedWriter(source, configs, mapping, cast, max_shard_size)
    check_space(destination, writer.total_bytes)
    with complete_directory(destination) as folder:
        with progress_bar("Writing", writer.total_bytes, progress) as bar:
            writer.write(folder, bar.update)
        processor.save_pretrained(folder)
        save_generation_config(source, configs.model, folder)
        save_pipelines(configs.model, folder)
        save_model_card(folder)
    return destination


def settle_overridden(source: OriginalCheckpoint, mapping: CheckpointMapping) -> None:
    """Keeps overridden tensors aside, unless they equal what overrides them; then they are not stored twice."""
    differing = []
    for (file, name), winner in mapping.overridden.items():
        own, other = source.read(file, name), source.read(*winner)
        if own.dtype == other.dtype and torch.equal(own, other):
            continue
        mapping.unused.append((file, name))
        rounded_alike = torch.equal(own, other.to(own.dtype)) or torch.equal(own.to(other.dtype), other)
        if file == names.STAGE2 and name.startswith("encoder.") and not rounded_alike:
            differing.append(f"{file}: {name} differs from {winner[0]}: {winner[1]}")
    if differing:
        raise ConversionError(listing("Both branches share one vision encoder, but the files hold two:", differing))


# The U-Nets and VAEs of the pixel decoders are checked against the classes that will load them.


# diffusers renames these when it loads an old checkpoint. They are stored as they are.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)")


def check_components(source: OriginalCheckpoint) -> None:
    """Names every unexpected, missing or misshapen tensor of the pixel decoders' models, and models without any."""
    problems = [problem for part in source.components for problem in component_problems(source.root, part)]
    if problems:
        raise ConversionError(listing("The tensors do not fit the pixel decoders:", problems))


def component_problems(root: Path, component: Component) -> list[str]:
    """What is wrong with the tensors of a U-Net or VAE, a line each; nothing with components of other libraries.

    Without diffusers, which only drawing needs, the tensors are taken as they are.
    """
    if component.weights is None and component.folder.rpartition("/")[2] in ("unet", "vae"):
        return [f"{component.folder} has no weights: diffusion_pytorch_model.safetensors or .bin is missing"]
    if component.weights is None or component.stem != "diffusion_pytorch_model":
        return []
    if importlib.util.find_spec("diffusers") is None:
        return []
    path = root / component.folder / "config.json"
    if not path.is_file():
        return [f"{component.folder}: missing config.json"]
    config = read_json(path)
    try:
        check_counts(config, len(component.weights.headers), path)
    except ValueError as error:
        return [str(error)]
    expected = _expected_shapes(config, component.folder)
    stored = {_new_name(name): name for name in component.weights.headers}
    found = {new: list(component.weights.headers[name].shape) for new, name in stored.items()}
    return sorted(
        [f"{component.folder}: missing {name} {expected[name]}" for name in expected.keys() - found.keys()]
        + [f"{component.folder}: unexpected {stored[name]} {found[name]}" for name in found.keys() - expected.keys()]
        + [
            f"{component.folder}: {stored[name]} has shape {found[name]}, expected {expected[name]}"
            for name in differing_shapes(found, expected)
        ]
    )


def _expected_shapes(config: dict, folder: str) -> Shapes:
    import diffusers  # slow to import

    model_class = getattr(diffusers, str(config.get("_class_name")), None)
    if model_class is None or not issubclass(model_class, diffusers.ModelMixin):
        raise ConversionError(f"{folder}/config.json names no model of diffusers ({config.get('_class_name')}).")
    try:
        with built_from(f"{folder}/config.json"):
            model = model_class.from_config(config)
    except ValueError as error:
        raise ConversionError(
            f"{folder}/config.json does not describe a network of the class {model_class.__name__}: {error}"
        ) from error
    return state_shapes(model)


def _new_name(name: str) -> str:
    match = _OLD_NAME.fullmatch(name)
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


# Processor and generation config.


def build_processor(source: OriginalCheckpoint, config: LavitConfig) -> ImageTextProcessor:
    """Builds the processor, checks that the text tokenizer fits the language model, and finds a row for placeholders.

    All rows of the published embeddings are taken, but byte fallback leaves one unused: that of the unknown token. It
    becomes the `image_token_id` of `config`.
    """
    # Imported here: importing the converter must not load the tokenizer and image libraries.
    from ..processing.image_processing_pil_lavit import LavitImageProcessorPil
    from ..processing.processing_lavit import ImageTextProcessor
    from ..processing.tokenization_lavit import LavitTokenizer, read_sentencepiece

    visual: Any = config.visual_tokenizer_config
    text: Any = config.text_config
    path = source.root / TEXT_TOKENIZER
    try:
        backend, special_tokens = read_sentencepiece(path)
        unknown_id = backend.token_to_id(special_tokens["unk_token"])
        tokenizer = LavitTokenizer.from_sentencepiece(path, visual.codebook_size, image_token_id=unknown_id)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    if tokenizer.boi_token_id != config.boi_token_id:
        raise ConversionError(
            f"{path} has {tokenizer.boi_token_id} tokens, but the language model's vocabulary "
            f"({text.vocab_size}) less {visual.codebook_size} codes, image start and image end leaves "
            f"{config.boi_token_id}."
        )
    if getattr(text, "pad_token_id", None) == unknown_id:
        text.pad_token_id = None  # Early Llamas pad with it; here padding is the end of text, and it is masked.
    config.image_token_id = tokenizer.image_token_id
    try:
        config.validate()
    except StrictDataclassClassValidationError as error:
        raise ConversionError(f"The unknown token cannot be the placeholder of images: {error}") from error
    height, width = visual.image_size
    image_processor = LavitImageProcessorPil(size={"height": height, "width": width})
    return ImageTextProcessor(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_length=visual.num_patches
    )


def save_generation_config(source: OriginalCheckpoint, config: LavitConfig, folder: Path) -> None:
    """Writes the special ids for generation; sampling options of the language model alone do not carry over."""
    path = source.root / "language_model/generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    ids = {key: stored.get(key, getattr(config.text_config, key)) for key in ("bos_token_id", "eos_token_id")}
    eos = ids["eos_token_id"]
    padding = eos[0] if isinstance(eos, list) else eos
    GenerationConfig(**ids, pad_token_id=padding).save_pretrained(folder)


# Tensors, and the record of the original layout.


@dataclass
class ConvertedWriter:
    """Writes everything that holds tensors, and the record of the original layout."""

    source: OriginalCheckpoint
    configs: Configs
    mapping: CheckpointMapping
    cast: torch.dtype | None
    max_shard_size: int | str

    def __post_init__(self) -> None:
        self.layout = Layout(dtype=str(self.cast).removeprefix("torch.") if self.cast else None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors to write."""
        unused = sum(self.source.weights[file].nbytes(name) for file, name in self.mapping.unused)
        models = sum(self._size(target) for targets in self.mapping.models.values() for target in targets.values())
        parts = [component.weights for component in self.source.components if component.weights]
        return unused + models + sum(weights.nbytes(name) for weights in parts for name in weights.headers)

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
            set_dtype(config, self.cast)
        config.save_pretrained(folder / model)

        def assemble(name: str) -> torch.Tensor:
            origins = targets[name].origins
            tensor = join([(origin.mark, self.source.read(origin.file, origin.name)) for origin in origins])
            return tensor.to(self._dtype(tensor.dtype))

        sizes = {name: self._size(target) for name, target in targets.items()}
        write_sharded(folder / model, "model", sizes, assemble, self.max_shard_size, progress)

    def _write_component(self, folder: Path, component: Component, progress: Progress) -> None:
        if component.weights:
            weights = component.weights
            sizes = {name: weights.nbytes(name) for name in weights.headers}
            target = folder / component.target
            write_sharded(target, component.stem, sizes, weights.read, self.max_shard_size, progress)
            self._record(component.folder, weights)
        for file in component.other_files:
            # An index of the source's shards beside the new ones would be taken for theirs.
            beside = f"{component.target}/{Path(file).name}"
            self._copy(folder, file, f"{FOLDER}/{file}" if file.endswith(".index.json") else beside)

    def _write_unused(self, folder: Path, progress: Progress) -> None:
        pairs = {unused_key(*pair): pair for pair in self.mapping.unused}
        if not pairs:
            return
        sizes = {key: self.source.weights[file].nbytes(name) for key, (file, name) in pairs.items()}

        def read(key: str) -> torch.Tensor:
            return self.source.read(*pairs[key])

        write_sharded(folder / FOLDER, UNUSED, sizes, read, self.max_shard_size, progress)
        for file, name in self.mapping.unused:
            self.layout.unused.setdefault(file, []).append(name)

    def _record(self, key: str, weights: Weights) -> None:
        for path, file in weights.files.items():
            stored = [name for name, info in weights.headers.items() if info.path == path]
            dtypes = {name: str(weights.dtype(name)).removeprefix("torch.") for name in stored}
            place = path.relative_to(self.source.root).as_posix()
            self.layout.files[place] = FileLayout(key, dtypes, file.holds_bare_tensor)

    def _copy(self, folder: Path, file: str, target: str) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source.root / file, folder / target)
        self.layout.copied[file] = target

    def _size(self, target: Target) -> int:
        assert target.dtype is not None
        return torch.Size(target.shape).numel() * self._dtype(target.dtype).itemsize

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype a tensor is written in: only floating point is cast."""
        return self.cast if self.cast is not None and stored.is_floating_point else stored


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turns `"bfloat16"` into `torch.bfloat16`; `None` (also as `"auto"`) keeps every tensor as stored."""
    if dtype is None or dtype == "auto":
        return None
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point or resolved.itemsize < 2:
        raise ConversionError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}.")
    return resolved
