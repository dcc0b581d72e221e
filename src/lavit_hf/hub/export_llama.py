"""The language model alone, as a plain Llama: images enter and leave as visual codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from ..conversion.weight_files import (
    Weights,
    check_destination,
    check_shard_size,
    check_space,
    complete_directory,
    write_sharded,
)
from ..modeling.configuration_lavit import LavitConfig
from ..processing.tokenization_lavit import LavitTokenizer
from ..utils.atomic_files import write_json
from ..utils.progress import progress_bar
from .facts import read_config
from .files import WEIGHTS, PublishError, check_weights, find_notices, list_files, read_object

# Where a converted checkpoint keeps the text tokenizer that it was converted from; llama.cpp reads it.
_SENTENCEPIECE = "original/language_model/tokenizer.model"
_UNKNOWN = "<unk>"
_BASE, _HEAD = "model.language_model.", "lm_head."


def export_llama(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Writes a checkpoint's language model as a directory of [`LlamaForCausalLM`].

    Its vocabulary is that of the whole model: text, image start, image end, visual codes. So it computes the same
    logits for text and for images as codes, and is served by what serves Llama. Images as continuous features need the
    whole model; the row of their placeholder stays, if it has one, and is suppressed in generation.

    Args:
        checkpoint: Directory of a LaVIT around a Llama.
        destination: Directory to create. It appears only when it is complete.
        max_shard_size: Largest size of a file of weights. About this much memory is needed.
        progress: Whether to show a progress bar.

    Returns:
        The created directory.

    Raises:
        PublishError: If the checkpoint is no LaVIT around a Llama, or is incomplete.
        ConversionError: If the destination cannot be written.
    """
    source, target = Path(checkpoint), Path(destination)
    if not source.is_dir():
        raise PublishError(f"{source} is not a directory; export-llama takes the directory of a checkpoint.")
    check_destination(target)
    check_shard_size(max_shard_size)
    config = read_config(source)
    found = list_files(source)
    # Only weights may be links to elsewhere: all other files are copied, and published with the export.
    linked = [file for file in found.refused if file.endswith(WEIGHTS)]
    for name in sorted(set(found.refused) - set(linked)):
        raise PublishError(f"{source / name} is part of the checkpoint, but {found.refused[name]}. Replace it.")
    files = sorted([*found.published, *linked])
    check_weights(source, files)
    if config.model_type != "lavit" or config.text_config.model_type != "llama":
        kind = config.model_type if config.model_type != "lavit" else config.text_config.model_type
        raise PublishError(f"{source} is no LaVIT around a Llama: its language model is of the type {kind!r}.")
    weights, names = _read_weights(source, config)
    sizes = {name: weights.nbytes(stored) for name, stored in names.items()}
    check_space(target, sum(sizes.values()))
    with complete_directory(target) as folder:
        with progress_bar("Writing", sum(sizes.values()), progress) as bar:
            write_sharded(folder, "model", sizes, lambda name: weights.read(names[name]), max_shard_size, bar.update)
        _llama_config(config, weights, names).save_pretrained(folder)
        _save_generation_config(source, config, folder)
        _save_tokenizer(source, config, folder)
        for notice in find_notices(files):
            shutil.copyfile(source / notice, folder / notice)
    return target


def _read_weights(source: Path, config: LavitConfig) -> tuple[Weights, dict[str, str]]:
    """The weights, and the names of those of the language model: Llama's to the stored ones."""
    weights = Weights(sorted(source.glob("model*.safetensors")))
    names = {}
    for stored in weights.headers:
        if stored.startswith(_BASE):
            names["model." + stored.removeprefix(_BASE)] = stored
        elif stored.startswith(_HEAD) and not config.tie_word_embeddings:
            names[stored] = stored
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if len(layers) != config.text_config.num_hidden_layers:
        raise PublishError(
            f"{source / 'config.json'} does not fit the weights: text_config.num_hidden_layers is "
            f"{config.text_config.num_hidden_layers}, but they have {len(layers)} layers."
        )
    needed = {"model.embed_tokens.weight", *(() if config.tie_word_embeddings else ("lm_head.weight",))}
    if missing := sorted(needed - names.keys()):
        raise PublishError(f"{source} has no weights of a language model: {missing[0]} is missing.")
    if f"{_HEAD}bias" in names:
        raise PublishError(f"{source}: the head of its language model has a bias, which a Llama has not.")
    return weights, names


def _llama_config(config: LavitConfig, weights: Weights, names: dict[str, str]) -> LlamaConfig:
    values = config.text_config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        values.pop(name, None)
    values |= {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": weights.dtype(names["model.embed_tokens.weight"]),
    }
    return LlamaConfig(**values)


def _save_generation_config(source: Path, config: LavitConfig, folder: Path) -> None:
    text: Any = config.text_config
    path = source / "generation_config.json"
    stored = read_object(path) if path.is_file() else {}
    ids = {name: stored.get(name, getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id")}
    placeholder = config.image_token_id
    suppressed = [placeholder] if placeholder < text.vocab_size else None
    GenerationConfig(**ids, pad_token_id=stored.get("pad_token_id"), suppress_tokens=suppressed).save_pretrained(
        folder
    )


def _save_tokenizer(source: Path, config: LavitConfig, folder: Path) -> None:
    """The tokenizer as one of transformers' own, without a placeholder that has no row or has taken over `<unk>`'s."""
    tokenizer = LavitTokenizer.from_pretrained(source)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, placeholder = content["model"]["vocab"], tokenizer.image_token_id
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if not tokenizer.boi_token_id < placeholder < config.text_config.vocab_size:
        del vocab[tokenizer.image_token]
    if placeholder < tokenizer.boi_token_id:
        vocab[_UNKNOWN] = placeholder
        special["unk_token"] = _UNKNOWN
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    plain = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=config.text_config.max_position_embeddings,
        padding_side=tokenizer.padding_side,
        split_special_tokens=tokenizer.split_special_tokens,
        chat_template=tokenizer.chat_template,
        **{name: token for name, token in special.items() if token is not None},
    )
    plain.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_object(path)
    # Named as in transformers 4, and with what llama.cpp asks for: prompts start without a BOS.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    write_json(path, settings, sort_keys=True)
    if (source / _SENTENCEPIECE).is_file():
        shutil.copyfile(source / _SENTENCEPIECE, folder / "tokenizer.model")
