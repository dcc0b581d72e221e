"""The language model alone, as a plain Llama: images enter and leave as visual codes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..conversion.convert import resolve_dtype
from ..conversion.weight_files import (
    Weights,
    check_destination,
    check_shard_size,
    check_space,
    complete_directory,
    find_weights,
    write_sharded,
)
from ..modeling.configuration_lavit import LavitConfig
from ..processing.tokenization_lavit import LavitTokenizer
from ..utils.atomic_files import write_json
from ..utils.progress import progress_bar
from .facts import read_config
from .files import WEIGHTS, PublishError, check_weights, find_notices, list_files, read_object
from .llama_gguf import NEVER_TYPED, check_llama_cpp, require_gguf, write_gguf

# Where a converted checkpoint keeps the text tokenizer that it was converted from; llama.cpp reads it.
_SENTENCEPIECE = "original/language_model/tokenizer.model"
_UNKNOWN = "<unk>"
# What vLLM writes into a chat where an embedding comes; one embedding stands for a picture with its start and end.
_EMBEDDING_WORDS = '{%- set embedding_words = ["<prompt_embeds>"] -%}\n'
GGUF_FILE = "model.gguf"
_BASE, _HEAD = "model.language_model.", "lm_head."


def export_llama(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    gguf: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Writes a checkpoint's language model as a directory of [`LlamaForCausalLM`].

    Its vocabulary is that of the whole model: text, image start, image end, visual codes. So it computes the same
    logits for text and for images as codes, and is served by what serves Llama. Images as continuous features need the
    whole model, or a server that takes embeddings; the row of their placeholder stays, if it has one, and is not
    generated. A `README.md` there tells how to serve it.

    Args:
        checkpoint: Directory of a LaVIT around a Llama.
        destination: Directory to create. It appears only when it is complete.
        dtype: Casts the weights; by default they stay as stored.
        gguf: Also write `model.gguf`, for llama.cpp. Needs the package `gguf`.
        max_shard_size: Largest size of a file of weights. About this much memory is needed.
        progress: Whether to show a progress bar.

    Returns:
        The created directory.

    Raises:
        PublishError: If the checkpoint is no LaVIT around a Llama, or is incomplete, or llama.cpp cannot compute it.
        ConversionError: If the destination cannot be written, or the dtype is none.
        ImportError: If `gguf` is asked for and missing.
    """
    cast = resolve_dtype(dtype)
    if gguf:
        require_gguf()
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
    dtypes = {name: weights.dtype(stored) for name, stored in names.items()}
    if cast is not None:
        dtypes = {name: cast if stored.is_floating_point else stored for name, stored in dtypes.items()}
    sizes = {name: weights.headers[stored].numel * dtypes[name].itemsize for name, stored in names.items()}
    total = sum(sizes.values()) * (2 if gguf else 1)
    check_space(target, total)
    with complete_directory(target) as folder:
        _llama_config(config, dtypes["model.embed_tokens.weight"]).save_pretrained(folder)
        _save_generation_config(source, config, folder)
        _save_tokenizer(source, config, folder)
        for notice in find_notices(files):
            shutil.copyfile(source / notice, folder / notice)
        if gguf:
            check_llama_cpp(folder)  # before all the weights
        with progress_bar("Writing", total, progress) as bar:
            write_sharded(
                folder,
                "model",
                sizes,
                lambda name: weights.read(names[name]).to(dtypes[name]),
                max_shard_size,
                bar.update,
            )
            if gguf:
                write_gguf(folder, folder / GGUF_FILE, bar.update)
        (folder / "README.md").write_text(_readme(config, folder, gguf), encoding="utf-8")
    return target


def _read_weights(source: Path, config: LavitConfig) -> tuple[Weights, dict[str, str]]:
    """The weights, and the names of those of the language model: Llama's to the stored ones."""
    weights = Weights(find_weights(source, "model"))  # of other variants, the same once more
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


def _llama_config(config: LavitConfig, dtype: torch.dtype) -> LlamaConfig:
    values = config.text_config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        values.pop(name, None)
    values |= {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype,
    }
    return LlamaConfig(**values)


def _save_generation_config(source: Path, config: LavitConfig, folder: Path) -> None:
    """All that the checkpoint says of generation, and that the placeholder is never written."""
    text: Any = config.text_config
    path = source / "generation_config.json"
    ids = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")}
    settings = {**ids, **(read_object(path) if path.is_file() else {})}
    if config.image_token_id < text.vocab_size:
        settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), config.image_token_id})
    known = {name: value for name, value in settings.items() if value is not None}
    write_json(folder / "generation_config.json", known, sort_keys=True)


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
    special = {name: token for name, token in special.items() if token is not None}
    _rename(content, {token: token + NEVER_TYPED for token in special.values()})
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    template = tokenizer.chat_template
    plain = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=config.text_config.max_position_embeddings,
        padding_side=tokenizer.padding_side,
        split_special_tokens=False,
        chat_template=_EMBEDDING_WORDS + template if isinstance(template, str) else template,
        **{name: token + NEVER_TYPED for name, token in special.items()},
    )
    plain.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_object(path)
    # Named as in transformers 4, and with what llama.cpp asks for: prompts start without a BOS.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    write_json(path, settings, sort_keys=True)
    if (source / _SENTENCEPIECE).is_file():
        shutil.copyfile(source / _SENTENCEPIECE, folder / "tokenizer.model")


def _rename(content: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames rows of the vocabulary of a tokenizer's JSON form, which are no added tokens then."""
    model = content["model"]
    model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _readme(config: LavitConfig, folder: Path, gguf: bool) -> str:
    generation = read_object(folder / "generation_config.json")
    start, end = config.boi_token_id, config.eoi_token_id
    first = config.visual_token_offset
    longest = config.visual_tokenizer_config.num_patches
    shortest = generation.get("min_new_tokens")
    text = _README.format(
        text=start - 1,
        start=start,
        end=end,
        first=first,
        last=first + config.visual_tokenizer_config.codebook_size - 1,
        placeholder=config.image_token_id,
        shortest=f', "min_tokens": {shortest}' if shortest else "",
        longest=longest,
    )
    return text + (_README_GGUF.format(end=end, longest=longest, file=GGUF_FILE) if gguf else "")


_README = """\
# A LaVIT's language model as a plain Llama

Written by `lavit export-llama`. It reads and writes text and pictures in one vocabulary:

| Ids | What |
|---|---|
| 0 to {text} | text |
| {start}, {end} | start and end of a picture |
| {first} to {last} | its codes, in between |
| {placeholder} | placeholder of features; never write it |

transformers loads it without other packages, and so do servers of language models. Pictures become codes, and codes
pictures, at the client, with the whole checkpoint. Text that spells a token of pictures or a control token stays text.

## vLLM

```text
python -m vllm.entrypoints.openai.api_server --model . --served-model-name lavit --enable-prompt-embeds
```

Text, after pictures as ids or without; leave ids of pictures out:

```text
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{{"model": "lavit", "temperature": 0,
  "prompt": [IDS], "allowed_token_ids": [IDS OF TEXT]{shortest}}}'
```

A picture: a prompt that ends in {start}. It has at most {longest} codes, one per patch, which a server does not know.

```text
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{{"model": "lavit", "temperature": 0,
  "prompt": [IDS, {start}], "allowed_token_ids": [{end}, {first}, ..., {last}], "stop_token_ids": [{end}],
  "ignore_eos": true, "max_tokens": {longest}, "return_token_ids": true}}'
```

A picture as features, with its start and end, as a part of a chat:
`{{"type": "prompt_embeds", "data": ...}}`. lavit-hf's documentation says how to make them, and which versions this was
run with.
"""

_README_GGUF = """
## llama.cpp

```text
llama-server -m {file}
```

`/completion` takes ids (`"prompt": [IDS]`), bans them (`"logit_bias": [[ID, false], ...]`) and returns them
(`"return_tokens": true`); it does not stop at an id, so ask for {longest} of a picture
(`"n_predict"`) and cut them at {end}.
"""
