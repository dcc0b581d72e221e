"""Reads a language model's text tokenizer, and appends LaVIT's visual vocabulary to it.

Both functions work on the `tokenizers` library's JSON form. Visual tokens become rows of the BPE vocabulary that no
merge produces: they convert to ids and back and cost nothing to load, yet no text a user types can become one, which
added tokens could not promise.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

BOI_TOKEN = "<img>"
EOI_TOKEN = "</img>"
IMAGE_TOKEN = "<image>"
VISUAL_TOKEN = "<visual_{}>"

_SPACE = "\u2581"  # sentencepiece's mark of a space
_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Texts on which sentencepiece models of another kind than Llama's (unigram, normalizing, joining spaces) would differ.
_PROBES = (
    "Question: what is it? Answer:",
    "  two  spaces ",
    "tab\tand\nnew line\r\n",
    "\ufb01 \u2460 \uff21 e\u0301 \u00a0x",
    "<s></s><unk><0x41> \u2581 \x00",
    "The quick brown foxes jumped over 1,234 lazy dogs; then they slept.",
    "\u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f642",
)


def check_text(text: Any) -> None:
    """Refuses text that holds half a character, in lists and dictionaries, too; it passes everything else.

    Raises:
        ValueError: If a text holds a lone surrogate, as JSON may spell it: no tokenizer takes it, and no file.
    """
    if isinstance(text, (list, tuple, Mapping)):
        for one in text.values() if isinstance(text, Mapping) else text:
            check_text(one)
    elif isinstance(text, str) and (found := _SURROGATE.search(text)):
        raise ValueError(
            f"A text holds the lone surrogate {found.group()!a} at position {found.start()}, half a character "
            f"({text[max(found.start() - 20, 0) : found.end() + 20]!a}): repair or drop it."
        )


def read_sentencepiece(model_file: str | Path) -> tuple[Tokenizer, dict[str, str]]:
    """Converts a sentencepiece BPE model (Llama's `tokenizer.model`); needs `sentencepiece`, but not protobuf.

    transformers' own conversion needs protobuf, gives a text that starts with a space other ids than sentencepiece
    does, and can merge typed text into control symbols.

    Returns:
        The tokenizer, and its special tokens by name (`bos_token`, ...).
    """
    try:  # so that transformers does not ask everyone for it who loads this file as remote code
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("Reading a sentencepiece model needs sentencepiece: pip install sentencepiece") from error

    try:
        model = SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model_file} is not a sentencepiece model: {error}") from error
    # A BPE piece's score is its rank, a unigram piece's a log-probability.
    is_bpe = all(model.get_score(index).is_integer() for index in range(model.get_piece_size()))
    tokenizer = _convert_sentencepiece(model)
    if not is_bpe or any(tokenizer.encode(text).ids != model.encode(text) for text in _PROBES):
        raise ValueError(
            f"{model_file} is a sentencepiece model of an unsupported kind: only BPE models without text "
            "normalization, as Llama's, can be converted."
        )
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names["pad_token"] = model.pad_id()
    return tokenizer, {name: model.id_to_piece(index) for name, index in names.items() if index >= 0}


def extend_with_visual_tokens(
    tokenizer: Tokenizer,
    codebook_size: int,
    special_tokens: Collection[str],
    text_vocab_size: int | None = None,
    image_token_id: int | None = None,
) -> Tokenizer:
    """Returns a copy of a BPE tokenizer with the visual vocabulary behind its own.

    Args:
        tokenizer: The text tokenizer's backend.
        codebook_size: Number of visual codes K.
        special_tokens: The text tokenizer's special tokens. They keep their ids, as rows of the vocabulary.
        text_vocab_size: The id V at which the visual vocabulary starts, where the language model's vocabulary is
            larger than the tokenizer's; the ids between get reserved names.
        image_token_id: The id of the placeholder, where it is not the one after the codes: that of a special token
            which no text becomes, such as Llama's `<unk>`. It takes that row over.

    Raises:
        ValueError: If the tokenizer is of another kind, or a user could type one of these tokens.
    """
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ValueError(
            f"Only BPE text tokenizers can be extended with visual tokens, got a {spec['model']['type']} tokenizer."
        )
    if codebook_size < 1:
        raise ValueError(f"`codebook_size` must be positive, got {codebook_size}.")
    vocab: dict[str, int] = spec["model"]["vocab"]
    specials = {token["content"] for token in spec["added_tokens"] if token["special"]} | set(special_tokens)
    _add_row_tokens(vocab, spec["added_tokens"])
    _fill_up_to(vocab, text_vocab_size)
    names = [BOI_TOKEN, EOI_TOKEN, *map(VISUAL_TOKEN.format, range(codebook_size)), IMAGE_TOKEN]
    taken = [name for name in names if name in vocab]
    if taken:
        raise ValueError(f"The text tokenizer has tokens of its own with the names {', '.join(taken[:5])}.")
    first_id = len(vocab)
    vocab.update({name: first_id + position for position, name in enumerate(names)})
    if image_token_id not in (None, vocab[IMAGE_TOKEN]):
        _take_row_over(spec["model"], specials, image_token_id)

    # Merges into a control symbol would let a user type it; sentencepiece never makes them.
    unmergeable = specials | set(names)
    if spec["model"].get("byte_fallback"):
        unmergeable |= {token for token in vocab if _BYTE_PIECE.fullmatch(token)}
    spec["model"]["merges"] = [pair for pair in _pairs(spec["model"]["merges"]) if "".join(pair) not in unmergeable]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    spec["post_processor"] = spec["padding"] = spec["truncation"] = None  # nothing is put around a segment
    extended = Tokenizer.from_str(json.dumps(spec))
    _check_untypable(extended, vocab, [*specials & set(vocab), *names[:3], *names[-2:]])
    return extended


def _convert_sentencepiece(model: Any) -> Tokenizer:
    size = model.get_piece_size()
    vocab = {model.id_to_piece(index): index for index in range(size)}
    scores = {
        model.id_to_piece(index): model.get_score(index)
        for index in range(size)
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index) or model.is_unused(index))
    }
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges_from_scores(scores),
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=sum(map(model.is_byte, range(size))) == 256,
        )
    )
    # Unlike the Metaspace pre-tokenizer, this adds the dummy space to a text that starts with a space, too.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _merges_from_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first, as sentencepiece applies them."""
    merges = [
        (-score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(merges, key=lambda merge: merge[:2])]


def _add_row_tokens(vocab: dict[str, int], added_tokens: list[dict[str, Any]]) -> None:
    """Gives added tokens a row at their id, so that nothing moves when they stop being added tokens."""
    used = {index: token for token, index in vocab.items()}
    for token in added_tokens:
        content, index = token["content"], token["id"]
        if vocab.get(content, index) != index or used.get(index, content) != content:
            raise ValueError(f"The text tokenizer's added token {content!r} does not fit its vocabulary.")
        vocab[content] = index
        used[index] = content


def _fill_up_to(vocab: dict[str, int], text_vocab_size: int | None) -> None:
    size = max(vocab.values()) + 1
    if text_vocab_size is not None and text_vocab_size < size:
        raise ValueError(f"`text_vocab_size` is {text_vocab_size}, but the text tokenizer has ids up to {size - 1}.")
    for index in sorted(set(range(text_vocab_size or size)) - set(vocab.values())):
        vocab[f"<reserved_{index}>"] = index


def _take_row_over(model: dict[str, Any], specials: set[str], image_token_id: int) -> None:
    """Makes the row of a special token that of the placeholder, if no text can become it."""
    vocab = model["vocab"]
    name = next((token for token, index in vocab.items() if index == image_token_id), None)
    if name not in specials:
        raise ValueError(
            f"The placeholder cannot take the id {image_token_id}, which is that of {name!r} and no special token's."
        )
    if model["unk_token"] == name:
        bytes_known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        if not (model["byte_fallback"] and bytes_known):
            raise ValueError(
                f"{name!r} ({image_token_id}) cannot be the placeholder of images, because characters that the text "
                "tokenizer does not know become it: it has no byte fallback. Use a tokenizer with byte fallback, as "
                "Llama's, or give the model a row of its own for the placeholder."
            )
        model["unk_token"] = None
    del vocab[name]
    vocab[IMAGE_TOKEN] = image_token_id


def _pairs(merges: Iterable[Any]) -> Iterable[tuple[str, str]]:
    for merge in merges:  # "a b" in files of old versions
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _check_untypable(tokenizer: Tokenizer, vocab: dict[str, int], names: Iterable[str]) -> None:
    tokenizer.encode_special_tokens = True
    for name in names:
        for text in (name, f" {name}", f"a{name}a"):
            if vocab[name] in tokenizer.encode(text, add_special_tokens=False).ids:
                raise ValueError(f"The text tokenizer would turn {name!r}, typed by a user, into a control token.")
