"""A plain Llama as one GGUF file, which llama.cpp loads, and what builds on it.

llama.cpp's own converter tells kinds of tokenizers apart by the ids that they give a test text, so that it knows none
but the published vocabularies that it lists. The kind is what `tokenizer.json` says, and is read from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..conversion.weight_files import Weights, find_weights
from ..processing.tokenization_lavit import BYTE_TOKEN
from ..utils.json_files import read_json_object
from ..utils.progress import Progress
from .files import PublishError

_RESERVED = re.compile(r"<reserved_\d+>")
# A noncharacter of Unicode, which no text holds: the export names special tokens with it, so that text spells none of
# them. Text becomes all special tokens that it spells, or none, and servers add their own, which it must become.
NEVER_TYPED = "\ufdd0"
_SPACE = "\u2581"  # sentencepiece's mark of a space
# Of sentencepiece's tokenizers, as `processing/tokenization_lavit.py` writes them.
_PREFIX_SPACE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}


def require_gguf() -> Any:
    """The package `gguf`, llama.cpp's own writer of such files.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("A GGUF file needs llama.cpp's writer: pip install 'lavit-hf[gguf]'") from error
    return gguf


def tokenizer_kind(spec: dict[str, Any]) -> str | None:
    """What llama.cpp calls the kind of a tokenizer of `tokenizer.json`; `None` if it would read text another way.

    `"gpt-2"` is byte-level BPE on text that GPT-2's expression has split, `"llama"` BPE of sentencepiece with a space
    before the text and bytes for what it does not know.
    """
    model, before = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or any(model.get(name) for name in ("dropout", "ignore_merges", "end_of_word_suffix")):
        return None
    if model["byte_fallback"] and before is None and spec["normalizer"] == _PREFIX_SPACE:
        return "llama"
    is_gpt2 = before is not None and before["type"] == "ByteLevel" and before.get("use_regex", True)
    if is_gpt2 and not before["add_prefix_space"] and spec["normalizer"] is None and not model["byte_fallback"]:
        return "gpt-2"
    return None


def check_llama_cpp(source: Path) -> None:
    """Refuses the directory of a plain Llama, with or without weights, that llama.cpp would compute in another way.

    Raises:
        PublishError: It computes no such model, or tokenizes in another way.
    """
    config: Any = LlamaConfig.from_pretrained(source)
    rope = config.rope_parameters["rope_type"]
    if config.hidden_act != "silu":
        raise PublishError(f"llama.cpp computes a Llama with silu; this one has {config.hidden_act!r}.")
    if rope not in ("default", "linear", "llama3"):
        raise PublishError(
            f"Rotary positions of the type {rope!r} are not written for llama.cpp; use its own convert_hf_to_gguf.py."
        )
    if tokenizer_kind(_read_tokenizer(source)) is None:
        raise PublishError(
            "The tokenizer is neither of GPT-2's kind nor sentencepiece's, which are those that are written for "
            "llama.cpp here; try its own convert_hf_to_gguf.py on the exported directory."
        )


def _read_tokenizer(source: Path) -> dict[str, Any]:
    return json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))


def write_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Writes the directory of a plain Llama as one file, in the precision that it is stored in.

    Vectors become float32, as llama.cpp wants them.

    Args:
        source: The directory, with `config.json`, `tokenizer.json`, `tokenizer_config.json` and weights.
        target: The file.
        progress: Told the number of bytes of every tensor.

    Raises:
        ImportError: The package `gguf` is missing.
        PublishError: See [`check_llama_cpp`].
    """
    gguf = require_gguf()
    check_llama_cpp(source)
    config: Any = LlamaConfig.from_pretrained(source)
    weights = Weights(find_weights(source, "model"))
    writer = gguf.GGUFWriter(target, "llama")
    _add_sizes(writer, config, gguf)
    _add_tokenizer(writer, source, config.vocab_size, gguf)
    plan = list(_plan(config, weights, gguf))
    for stored, name, kind in plan:
        header = weights.headers[stored]
        shape, itemsize = list(header.shape), gguf.GGML_QUANT_SIZES[kind][1]
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint8}[kind.name]
        if dtype is np.uint8:  # the writer knows no bfloat16: it takes shapes in bytes
            shape[-1] *= itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), header.numel * itemsize, raw_dtype=kind)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored, _, kind in plan:
            tensor = _reorder(weights.read(stored), stored, config)
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kind))
            progress(weights.nbytes(stored))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()


def _add_sizes(writer: Any, config: Any, gguf: Any) -> None:
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: Any) -> np.ndarray | None:
    """By how much Llama 3.1 and later slow their rotary frequencies down, `[head_dim / 2]`."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return (1 / config.rope_parameters["rope_theta"] ** steps / slowed).numpy()


def _plan(config: Any, weights: Weights, gguf: Any) -> Iterator[tuple[str, str, Any]]:
    """Of every tensor its name, its name in GGUF and its type there."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kinds = gguf.GGMLQuantizationType
    of_dtype = {torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    for stored, header in weights.headers.items():
        name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PublishError(f"llama.cpp has no place for the tensor {stored}.")
        kind = kinds.F32 if len(header.shape) == 1 else of_dtype.get(weights.dtype(stored), kinds.F32)
        yield stored, name, kind


def _reorder(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Puts rows of queries and keys into the order of the original Llama: rotated pairs are neighbors."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, source: Path, vocab_size: int, gguf: Any) -> None:
    spec, settings = _read_tokenizer(source), read_json_object(source / "tokenizer_config.json")
    kind = tokenizer_kind(spec)
    added = {token["content"]: token for token in spec["added_tokens"]}
    names = dict(sorted((index, name) for name, index in spec["model"]["vocab"].items()))
    names |= {token["id"]: name for name, token in added.items()}
    special = {
        name: settings[f"{name}_token"] for name in ("bos", "eos", "unk", "pad") if settings.get(f"{name}_token")
    }
    types = gguf.TokenType

    def token_type(name: str) -> Any:
        # llama.cpp looks for control tokens in text, so none is one but the end, which it takes for one anyway.
        if name in special.values():
            return types.CONTROL if name == special.get("eos") else types.NORMAL
        if name in added:
            return types.USER_DEFINED
        if kind == "llama" and BYTE_TOKEN.fullmatch(name):
            return types.BYTE
        return types.UNUSED if _RESERVED.fullmatch(name) else types.NORMAL

    tokens = [names.get(index, f"<reserved_{index}>") for index in range(vocab_size)]
    ids = {name: index for index, name in enumerate(tokens)}
    merges = [tuple(merge) if not isinstance(merge, str) else merge.split(" ") for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2" if kind == "gpt-2" else kind)
    writer.add_tokenizer_pre(kind if kind == "gpt-2" else "default")
    writer.add_token_list([name.removesuffix(NEVER_TYPED) for name in tokens])
    writer.add_token_types([token_type(name) for name in tokens])
    if kind == "gpt-2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(True)
    for name, token in special.items():
        getattr(writer, f"add_{name}_token_id")(ids[token])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    template = source / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Sentencepiece's scores, which rank pieces: they are merged in the order in which `merges` names them first."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
