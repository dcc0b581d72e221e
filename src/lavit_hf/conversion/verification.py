"""`lavit verify`: all that is missing, odd or corrupt in a download, named at once and before anything is written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..utils.paths import check_links
from ..utils.progress import progress_bar
from .configs import PUBLISHED_HEADS, infer_configs
from .convert import build_processor, component_problems, settle_overridden
from .mapping import CheckpointMapping, map_checkpoint
from .original import (
    COMPONENTS,
    OPTIONAL,
    PIXEL_DECODERS,
    REQUIRED,
    TEXT_CONFIG,
    TEXT_TOKENIZER,
    Component,
    OriginalCheckpoint,
    find_component_weights,
    find_original,
    missing_of_pixel_decoders,
)
from .weight_files import ConversionError, WeightFile, Weights, read_json

if TYPE_CHECKING:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..modeling.modeling_lavit_token_decoder import LavitTokenDecoder

# No tensor tells the numbers of attention heads, and none depends on them.
_ANY_HEADS = dict.fromkeys(PUBLISHED_HEADS, 1)
# What libraries raise on files that do not fit together; their messages name the file.
_UNUSABLE = (OSError, RuntimeError, ValueError)


def verify(src: str | os.PathLike[str], *, progress: bool = True) -> list[str]:
    """Looks for what is missing, odd or corrupt in a checkpoint, and writes nothing.

    Every file of weights is read once: pickles carry a checksum of each tensor, and no tensor may hold NaN or
    infinity. (safetensors have no checksums: `hf cache verify` compares those of a download with the Hub.) Names,
    shapes and dtypes are compared with the models that the tensors are for, once all files are there and readable.

    Args:
        src: Directory in the original's layout, or with a LaVIT for `from_pretrained`.
        progress: Whether to show a progress bar.

    Returns:
        The problems, a line each. Without any, `convert` or `from_pretrained` finds all it needs.

    Raises:
        ConversionError: There is no such directory, or it holds adapters.
    """
    root = Path(src)
    if not root.is_dir():
        raise ConversionError(f"{root} is not a directory." if root.exists() else f"{root} does not exist.")
    if (root / ADAPTER_CONFIG_NAME).is_file() and not (root / "config.json").is_file():
        raise ConversionError(
            f"{root} holds adapters of LoRA, which cannot be verified alone: verify their base, or what "
            f"lavit merge {root} OUT makes of both."
        )
    problems = _Problems()
    with problems.noted():
        check_links(root, ConversionError)
    if not problems.found:
        (_verify_converted if _is_converted(root) else _verify_original)(root, problems, progress)
    return list(dict.fromkeys(problems.found))


class _Problems:
    """What was found so far."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes an error of the body instead of raising it; of a list of problems, each becomes a line of its own."""
        try:
            yield
        except _UNUSABLE as error:
            title, *lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
            self.found += [f"{title} {line}" for line in lines] if lines and title.endswith(":") else [title]


def _is_converted(root: Path) -> bool:
    try:
        return read_json(root / "config.json").get("model_type") == "lavit"
    except (OSError, ConversionError):  # also a broken one: without the original's folders, its absence is named
        return (root / "config.json").is_file() and not (root / "language_model").is_dir()


def _verify_original(root: Path, problems: _Problems, progress: bool) -> None:
    paths = []
    for file in (*REQUIRED, *OPTIONAL):
        with problems.noted():
            found = find_original(root, file)
            if not found and file in REQUIRED:
                raise ConversionError(f"{root / file}.bin or .safetensors is missing.")
            paths += found
    needed = [root / name for name in (TEXT_CONFIG, TEXT_TOKENIZER)]
    problems.found += [f"{path} is missing." for path in needed if not path.is_file()]
    problems.found += [f"{root / name} is missing." for name in missing_of_pixel_decoders(root)]
    for folder in PIXEL_DECODERS:
        for name in COMPONENTS:
            with problems.noted():
                paths += find_component_weights(root / folder / name)[0]
    _verify_files(paths, problems, progress)
    if problems.found:  # of gaps one cannot tell what else would fit
        return
    with problems.noted():
        source = OriginalCheckpoint(root)
        configs = infer_configs(source.headers, source.text_config, _ANY_HEADS)
        with problems.noted():
            build_processor(source, configs.model)
        for part in source.components:
            with problems.noted():
                problems.found += component_problems(root, part)
        mapping = map_checkpoint(source.headers, configs)
        problems.found += _odd_dtypes(mapping)
        settle_overridden(source, mapping)


def _odd_dtypes(mapping: CheckpointMapping) -> list[str]:
    """Weights of models are floating point numbers, of 16 bits at least."""
    return [
        f"{origin.file}: {origin.name} has the dtype {str(target.dtype).removeprefix('torch.')}, expected a "
        "floating point number of at least 16 bits"
        for targets in mapping.models.values()
        for target in targets.values()
        for origin in target.origins
        if target.dtype is not None and (not target.dtype.is_floating_point or target.dtype.itemsize < 2)
    ]


def _verify_files(paths: list[Path], problems: _Problems, progress: bool) -> None:
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    with progress_bar("Checking", sum(sizes.values()), progress) as bar:
        for path, size in sizes.items():
            with problems.noted():
                file = WeightFile(path)
                headers = file.headers()
                file.verify()
                problems.found += [
                    f"{path}: {name} holds NaN or infinity."
                    for name, info in headers.items()
                    if info.dtype is not None and info.dtype.is_floating_point and not _is_finite(file.read(name))
                ]
                file.close()
            bar.update(size)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or tensor.dtype.itemsize < 2:  # nothing is computed in 8 bits
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


# Checkpoints that `from_pretrained` loads.


def _verify_converted(root: Path, problems: _Problems, progress: bool) -> None:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..processing.processing_lavit import ImageTextProcessor

    _verify_files(sorted(root.rglob("*.safetensors")), problems, progress)
    with problems.noted():
        ImageTextProcessor.from_pretrained(root)
    if problems.found:
        return
    with problems.noted():
        problems.found += _model_problems(LavitForConditionalGeneration, root)
    if importlib.util.find_spec("diffusers") is None:  # nothing here would load a pixel decoder
        return
    for folder in PIXEL_DECODERS.values():
        if (root / folder / "model_index.json").is_file():
            with problems.noted():
                _verify_pixel_decoder(root, folder, problems)


def _verify_pixel_decoder(root: Path, folder: str, problems: _Problems) -> None:
    from ..modeling.modeling_lavit_token_decoder import LavitTokenDecoder
    from ..pipelines.pixel_decoder_storage import check_index

    check_index(root / folder)
    with problems.noted():
        problems.found += _model_problems(LavitTokenDecoder, root / folder / "token_decoder")
    for name in ("unet", "vae"):
        place = f"{folder}/{name}".lstrip("/")
        with problems.noted():
            paths, stem = find_component_weights(root / place)
            weights = Weights(paths) if paths else None
            problems.found += component_problems(root, Component(place, place, weights, stem))


def _model_problems(
    model_class: type[LavitForConditionalGeneration] | type[LavitTokenDecoder], folder: Path
) -> list[str]:
    """What transformers would report if it loaded a model, which it does here without memory."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # its report, which is returned
    logging.disable_progress_bar()
    try:
        loaded: Any = model_class.from_pretrained(
            folder, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
        )
        _, report = loaded
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
    return [
        *(f"{folder}: missing {name}" for name in sorted(report["missing_keys"])),
        *(f"{folder}: unexpected {name}" for name in sorted(report["unexpected_keys"])),
        *(
            f"{folder}: {name} has shape {list(found)}, expected {list(expected)}"
            for name, found, expected in sorted(report["mismatched_keys"])
        ),
    ]
