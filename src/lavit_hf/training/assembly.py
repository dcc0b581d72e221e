"""Joins what stage 2 and stage 3 write: a language model and pixel decoders, as one checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..conversion.model_card import copy_notices_of, describe_source, save_derived_card
from ..conversion.original import find_component_weights
from ..conversion.weight_files import (
    ConversionError,
    Weights,
    check_destination,
    check_space,
    complete_directory,
    read_json,
)
from ..modeling.configuration_lavit import LavitConfig
from ..modeling.modeling_lavit_visual_tokenizer import same_codebooks
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX, copy_pixel_decoders, link_pixel_decoders
from ..remote_code import save_remote_code
from ..utils.paths import resolve_inside
from ..utils.progress import progress_bar

_PARTS = ("token_decoder", "unet", "vae")
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
# Of a language model; code is made anew.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "README.md",
)
_CODEBOOK = "visual_tokenizer.discrete.quantizer.codebook.weight"


def assemble(
    language_model: str | os.PathLike[str],
    pixel_decoder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint of a language model with its processor, and of pixel decoders of the same codes.

    Args:
        language_model: Directory of a LaVIT, as stage 2 writes it. Pixel decoders in it are left out.
        pixel_decoder: Directory that stage 3 writes, or that of a LaVIT, of which all pixel decoders are taken. Which
            ids their codes had elsewhere makes no difference: those of `language_model` are written down.
        destination: Directory to create. It appears only when it is complete.
        progress: Whether to show a progress bar.

    Returns:
        The created directory.

    Raises:
        ConversionError: Something is missing in either of them, they do not belong together, or the destination cannot
            be written.
    """
    source, drawing, target = Path(language_model), Path(pixel_decoder), Path(destination)
    check_destination(target)
    config = _read_language_model(source)
    weights = _read_weights(source)
    names = [name for name in weights.headers if name.endswith(_CODEBOOK)]
    if not names:
        raise ConversionError(f"{source} has no visual tokenizer in its weights: {_CODEBOOK} is missing.")
    codebook = weights.read(names[0])
    decoders = [drawing / folder for folder in DECODER_FOLDERS if (drawing / folder / MODEL_INDEX).is_file()]
    if not decoders:
        raise ConversionError(_what_else(drawing))
    for decoder in decoders:
        _check_pixel_decoder(decoder, config, codebook, source)
    files = sorted({path for pattern in _FILES for path in source.glob(pattern) if path.is_file()})
    for path in files:
        resolve_inside(source, path.name, str(source), ConversionError)
    parts = [path for decoder in decoders for part in _PARTS for path in (decoder / part).glob("*")]
    size_of_parts = sum(path.stat().st_size for path in parts)
    total = sum(path.stat().st_size for path in files) + size_of_parts
    check_space(target, total)
    with complete_directory(target) as folder:
        with progress_bar("Writing", total, progress) as bar:
            for path in files:
                shutil.copyfile(path, folder / path.name)
                bar.update(path.stat().st_size)
            try:
                copy_pixel_decoders(drawing, folder)
                for origin in (source, drawing):
                    copy_notices_of(origin, folder)
            except ValueError as error:
                raise ConversionError(str(error)) from error
            bar.update(size_of_parts)
        link_pixel_decoders(folder)
        save_remote_code(folder)
        if not (folder / "README.md").exists():
            parts_of = f"{describe_source(str(source))} and the pixel decoder of {describe_source(str(drawing))}"
            save_derived_card(folder, f"It was put together with `lavit assemble`, of {parts_of}.", [str(source)])
    return target


def _read_language_model(root: Path) -> LavitConfig:
    """The configuration of a language model that is complete."""
    _check_directory(root)
    if (root / "adapter_config.json").is_file():
        raise ConversionError(f"{root} holds adapters of LoRA; first merge them: lavit merge {root} OUT")
    if not (root / "config.json").is_file():
        if (root / MODEL_INDEX).is_file():
            raise ConversionError(f"{root} is a pixel decoder; name the language model first, then the pixel decoder.")
        raise ConversionError(f"{root} is no LaVIT: it has no config.json.")
    model_type = read_json(root / "config.json").get("model_type")
    if model_type != "lavit":
        raise ConversionError(f"{root} is no LaVIT: its config.json is of a {model_type!r} model.")
    try:
        config = LavitConfig.from_pretrained(root)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        raise ConversionError(f"{root / 'config.json'}: {error}") from error
    if missing := [name for name in PROCESSOR_FILES if not (root / name).is_file()]:
        raise ConversionError(f"{root} has no {missing[0]}: save the processor there, too.")
    return config


def _check_pixel_decoder(root: Path, model: LavitConfig, codebook: torch.Tensor, source: Path) -> None:
    """Refuses a pixel decoder that is not complete, whose parts do not fit, or that is of other codes."""
    read_json(root / MODEL_INDEX)
    weights = {part: _read_weights(root / part) for part in _PARTS}
    decoder, unet, vae = (read_json(root / part / "config.json") for part in _PARTS)
    visual: Any = model.visual_tokenizer_config
    width, pooled = unet.get("cross_attention_dim"), decoder.get("pooled_size")
    width = max(width) if isinstance(width, list) else width
    heads = decoder.get("cross_attention_dims") or []
    for name, own, other, owner in (
        ("codes", decoder.get("codebook_size"), visual.codebook_size, source),
        ("numbers per code", decoder.get("codebook_dim"), visual.codebook_dim, source),
        ("numbers per condition", sum(heads), width, "its U-Net"),
        ("a pooled condition", pooled is not None, unet.get("addition_embed_type") == "text_time", "its U-Net"),
        ("channels of latents", vae.get("latent_channels"), unet.get("in_channels"), "its U-Net"),
    ):
        if own != other:
            raise ConversionError(f"{root} does not fit: {name}: {own} there, {other} in {owner}.")
    if decoder.get("num_queries", 0) < visual.num_patches:
        raise ConversionError(
            f"{root} takes at most {decoder.get('num_queries')} codes per image, but an image of {source} may have "
            f"{visual.num_patches}."
        )
    names = [name for name in weights["token_decoder"].headers if name == "codebook.weight"]
    if not names or not same_codebooks(weights["token_decoder"].read(names[0]), codebook):
        raise ConversionError(
            f"{root} was trained with the codes of another visual tokenizer than that of {source}: their codebooks "
            "differ."
        )


def _read_weights(root: Path) -> Weights:
    paths, _ = find_component_weights(root) if root.is_dir() else ([], "")
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise ConversionError(f"{root} has no weights in the safetensors format.")
    return Weights(paths)


def _what_else(root: Path) -> str:
    """Why a directory holds no pixel decoder."""
    _check_directory(root)
    if any((root / name).exists() for name in ("random_states_0.pkl", "scheduler.bin", "state.json")):
        return f"{root} is what training goes on from; stage 3 writes the finished pixel decoder beside it."
    if (root / "config.json").is_file():
        model_type = read_json(root / "config.json").get("model_type")
        return f"{root} holds a {model_type!r} model and no pixel decoder: it has no {MODEL_INDEX}."
    return f"{root} holds no pixel decoder: it has no {MODEL_INDEX}."


def _check_directory(root: Path) -> None:
    if not root.is_dir():
        raise ConversionError(f"{root} is not a directory." if root.exists() else f"{root} does not exist.")
