"""LaVIT's tokenizer: the language model's text tokenizer with the visual vocabulary behind it.

With V text ids and K codes: `<img>` is V, `</img>` V+1, `<visual_c>` V+2+c, and `<image>`, the placeholder that a
feature replaces, V+2+K. Models without a row for V+2+K, as the published ones, have `<image>` in place of a row of
text that no text becomes.

Visual tokens become rows of the BPE vocabulary that no merge produces: they convert to ids and back and cost nothing
to load, yet no text a user types can become one, which added tokens could not promise. That is done on the
`tokenizers` library's JSON form.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, overload

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ..modeling.remote_code_mixin import IS_PACKAGE, RemoteCodeMixin
from ..utils.json_files import read_json_object

BOI_TOKEN = "<img>"
EOI_TOKEN = "</img>"
IMAGE_TOKEN = "<image>"
VISUAL_TOKEN = "<visual_{}>"
_SPACE = "\u2581"  # sentencepiece's mark of a space
_SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of tokenizers that fall back on bytes
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
# How a tokenizer was loaded, which the base class keeps among its settings; remote code needs the last one there.
_REMOTE_CODE_KWARGS = ("auto_map",) if IS_PACKAGE else ()
_LOADING_KWARGS = ("is_local", "local_files_only", "trust_remote_code", "added_tokens_decoder", *_REMOTE_CODE_KWARGS)
_LARGEST_ID = 2**32 - 1  # the backend knows no larger ones
_VISUAL_NAME = re.compile(r"</?img>|<visual_\d+>")
_Codes = TypeVar("_Codes", int, list[int], tuple[int, ...], np.ndarray, torch.Tensor)
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"
# Of what a processor and a tokenizer are made; at least one of the first must be there.
_FILES = {
    "processor": ((PROCESSOR_FILE, "preprocessor_config.json"), ("tokenizer_config.json", TOKENIZER_FILE)),
    "tokenizer": ((TOKENIZER_FILE,), ("tokenizer_config.json",)),
}


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
    try:  # by its name, or diffusers would ask everyone for it who loads this file as remote code
        sentencepiece: Any = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ImportError("Reading a sentencepiece model needs sentencepiece: pip install sentencepiece") from error

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
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
        unmergeable |= {token for token in vocab if BYTE_TOKEN.fullmatch(token)}
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


class LavitTokenizer(RemoteCodeMixin, TokenizersBackend):
    """Text and visual vocabulary in one.

    It never adds a BOS or EOS, and pads on the left. Text is only ever text: `"</s>"`, `"<visual_7>"` or `"<image>"`
    typed by a user become the ids of their characters (`ImageTextProcessor` puts the images in). Decoding with
    `skip_special_tokens=True` hides the visual ids too.

    Tokens that you add (`add_tokens`, or `add_special_tokens` with `extra_special_tokens`) lie behind all others and
    are the exception: text that names one becomes it. Each stretch of text between them is tokenized as if it stood
    alone.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    boi_token = BOI_TOKEN
    eoi_token = EOI_TOKEN
    image_token = IMAGE_TOKEN

    def __init__(self, *args: Any, split_special_tokens: bool = True, **kwargs: Any) -> None:
        for name in ("add_bos_token", "add_eos_token"):
            kwargs.pop(name, None)
        if kwargs.get("pad_token") is None:
            kwargs["pad_token"] = kwargs.get("eos_token")
        super().__init__(*args, split_special_tokens=split_special_tokens, **kwargs)
        if isinstance(self.model_max_length, bool) or not isinstance(self.model_max_length, Real):
            raise ValueError(f"model_max_length must be a number of ids; got {self.model_max_length!r}.")
        for name in _LOADING_KWARGS:  # or they would be saved as settings
            self.init_kwargs.pop(name, None)
        for name, token in self.special_tokens_map.items():
            self._check_named(name, token)
        if self._tokenizer.token_to_id(IMAGE_TOKEN) is None:
            raise ValueError(
                "This tokenizer has no visual vocabulary; make one with `LavitTokenizer.from_text_tokenizer` or "
                "`LavitTokenizer.from_sentencepiece`."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Self:
        """See [`PreTrainedTokenizerBase.from_pretrained`].

        Raises:
            OSError: If a file is missing or corrupt.
            ValueError: If values in a file cannot be used.
        """
        with name_broken_file(pretrained_model_name_or_path, "tokenizer"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # The base class would take the backend apart to rebuild it in `__init__`; ours reads it from its file.
        return kwargs

    @classmethod
    def from_sentencepiece(
        cls,
        model_file: str | Path,
        codebook_size: int,
        text_vocab_size: int | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> LavitTokenizer:
        """Extends a sentencepiece BPE model (Llama's `tokenizer.model`); its ids stay exactly sentencepiece's.

        Args:
            model_file: The file.
            codebook_size: Number of visual codes K.
            text_vocab_size: V, if the language model has more embedding rows than the tokenizer has ids.
            image_token_id: The model's; V+2+K by default. Llama's `<unk>`, 0, becomes `<image>` in published models.
            kwargs: Those of the class.

        Raises:
            ValueError: If text can become `image_token_id`, or the file is of another kind.
        """
        backend, special_tokens = read_sentencepiece(model_file)
        return cls._extend(
            backend, special_tokens, codebook_size, special_tokens.values(), text_vocab_size, image_token_id, **kwargs
        )

    @classmethod
    def from_text_tokenizer(
        cls,
        text_tokenizer: PreTrainedTokenizerBase,
        codebook_size: int,
        text_vocab_size: int | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> LavitTokenizer:
        """Extends a BPE text tokenizer of transformers; the ids of its tokens, added ones included, stay.

        Args:
            text_tokenizer: A tokenizer backed by the `tokenizers` library.
            codebook_size: Number of visual codes K.
            text_vocab_size: V, if the language model has more embedding rows than the tokenizer has ids.
            image_token_id: The model's; V+2+K by default. Another one has to be that of a special token which no text
                becomes, such as `<unk>`.
            kwargs: Those of the class.

        Raises:
            ValueError: If text can become `image_token_id`, or the tokenizer is of another kind.
        """
        backend = getattr(text_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"Only tokenizers backed by the `tokenizers` library can be extended, got "
                f"{type(text_tokenizer).__name__}."
            )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special_tokens = {name: getattr(text_tokenizer, name) for name in names if getattr(text_tokenizer, name, None)}
        kwargs.setdefault("model_max_length", text_tokenizer.model_max_length)
        known = text_tokenizer.all_special_tokens
        return cls._extend(backend, special_tokens, codebook_size, known, text_vocab_size, image_token_id, **kwargs)

    @classmethod
    def _extend(
        cls,
        backend: Any,
        named_tokens: dict[str, str],
        codebook_size: int,
        special_tokens: Collection[str],
        text_vocab_size: int | None,
        image_token_id: int | None,
        **kwargs: Any,
    ) -> LavitTokenizer:
        extended = extend_with_visual_tokens(backend, codebook_size, special_tokens, text_vocab_size, image_token_id)
        # The token that has become the placeholder is not there anymore.
        lost = {name: token for name, token in named_tokens.items() if extended.token_to_id(token) is None}
        if needed := sorted(lost.keys() - {"unk_token", "pad_token"}):
            raise ValueError(f"The placeholder cannot take the id {image_token_id}: it is that of the {needed[0]}.")
        kept = {name: token for name, token in named_tokens.items() if name not in lost}
        return cls(tokenizer_object=extended, **{**kept, **kwargs})

    @property
    def boi_token_id(self) -> int:
        """V: the id of the token that starts an image."""
        return self._tokenizer.token_to_id(BOI_TOKEN)

    @property
    def eoi_token_id(self) -> int:
        """V+1: the id of the token that ends an image."""
        return self._tokenizer.token_to_id(EOI_TOKEN)

    @property
    def visual_token_offset(self) -> int:
        """V+2: the id of code 0."""
        return self.boi_token_id + 2

    @property
    def image_token_id(self) -> int:
        """The id of the placeholder that a continuous feature replaces: V+2+K, or an unused row of text."""
        return self._tokenizer.token_to_id(IMAGE_TOKEN)

    @property
    def codebook_size(self) -> int:
        """K: the number of visual codes."""
        placeholder = self.image_token_id
        # Tokens that were added later are not counted here.
        has_own_row = placeholder > self.boi_token_id
        end = placeholder if has_own_row else self._tokenizer.get_vocab_size(with_added_tokens=False)
        return end - self.visual_token_offset

    def convert_codes_to_ids(self, codes: _Codes) -> _Codes:
        """Codes (0 to K-1; an int, a list, a tuple, an array or a tensor) to token ids."""
        self._check_range(codes, 0, self.codebook_size, "code")
        return _shift(codes, self.visual_token_offset)

    def convert_ids_to_codes(self, ids: _Codes) -> _Codes:
        """Token ids of visual codes (an int, a list, a tuple, an array or a tensor) to codes."""
        codes = self._code_ids
        self._check_range(ids, codes.start, codes.stop, "visual token id")
        return _shift(ids, -self.visual_token_offset)

    def add_image_start_and_end(self, ids: Iterable[int]) -> list[int]:
        """The ids of an image as text has it in it: its start, `ids` (of codes, or placeholders), its end."""
        return [self.boi_token_id, *ids, self.eoi_token_id]

    def split_images(self, ids: Any) -> list[IdRun]:
        """Splits what a model wrote into runs of text and images.

        Args:
            ids: One sequence, `[length]`: a list, an array or a tensor.

        Returns:
            Runs in order, each with its `kind` (`"text"`, `"image"`, or `"features"` for continuous images of the
            prompt) and its `ids` (text ids, or codes). Ids that do not belong into an image, or do not exist, are
            dropped.

        Raises:
            ValueError: It is no sequence of ids.
        """
        rows = as_rows(ids)
        if len(rows) != 1:
            raise ValueError(f"Expected the ids of one sequence, got {len(rows)}.")
        last = max(self._code_ids.stop - 1, self.image_token_id)  # behind it are tokens that were added, or nothing
        ids = [i for i in _check_ids(rows[0]) if i <= last or self._tokenizer.id_to_token(i) is not None]
        visual = VisualIds(self.boi_token_id, self.eoi_token_id, self._code_ids, self.image_token_id)
        return split_ids(ids, visual, self._control_ids)

    @staticmethod
    def _check_range(values: Any, low: int, high: int, name: str) -> None:
        for value in np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values).flat:
            if not low <= _check_integer(value) < high:
                raise ValueError(f"{value} is not a {name}: expected {low} to {high - 1}.")

    def __setattr__(self, key: str, value: Any) -> None:
        """As everywhere (`tokenizer.pad_token = ...`, `pad_token_id = ...`).

        Raises:
            ValueError: If a token of images would get a role in text.
        """
        name = key.removesuffix("_id")
        if name in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            self._check_named(name, value if key == name else self.convert_ids_to_tokens(value))
        super().__setattr__(key, value)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As everywhere, but `extra_special_tokens` are your own: they may be typed.

        Raises:
            ValueError: If one of them is a token of images, or holds half a character.
        """
        check_text(special_tokens_dict)
        for name, value in (special_tokens_dict or {}).items():  # before anything changes
            if name in ("extra_special_tokens", "additional_special_tokens"):
                for token in value or ():
                    self._check_declared(str(token))
            else:
                self._check_named(name, value)
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds a caller's tokens so that text becomes them, and the named ones (BOS, EOS, ...) so that it does not."""
        named = {str(token) for token in self._special_tokens_map.values() if token}
        declared, control = [], []
        for token in new_tokens:
            check_text(str(token))
            is_special = special_tokens or getattr(token, "special", False)
            token = token if isinstance(token, AddedToken) else AddedToken(token)
            if token.content in named:
                control.append(token)
                continue
            self._check_declared(token.content)
            if is_special and token.content not in self.extra_special_tokens:
                self._extra_special_tokens.append(token)
            # To the backend it is not special, because special tokens cannot be typed. Nor is it normalized: "<point>"
            # would become the word "\u2581<point>", which is found after a space only.
            options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
            declared.append(AddedToken(token.content, special=False, normalized=False, **options))
        return self._tokenizer.add_special_tokens(control) + self._tokenizer.add_tokens(declared)

    @staticmethod
    def _check_named(name: str, token: Any) -> None:
        if str(token) == IMAGE_TOKEN or _VISUAL_NAME.fullmatch(str(token)):
            raise ValueError(
                f"{name} cannot be {str(token)!r}, which is a token of images: padding or the end of a text would be "
                "taken for one. Choose a token of the text."
            )

    @staticmethod
    def _check_declared(token: str) -> None:
        if IMAGE_TOKEN in token or _VISUAL_NAME.fullmatch(token):
            raise ValueError(
                f"{token!r} cannot be added: it names a token of images ({BOI_TOKEN}, {EOI_TOKEN}, {IMAGE_TOKEN} or a "
                "visual code), which no text may become. Choose another name."
            )

    @property
    def _control_ids(self) -> set[int]:
        """Ids of the text tokenizer's own special tokens, without those that were added."""
        return set(self.all_special_ids) - set(self.extra_special_tokens_ids)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_text(text)
        check_text(text_pair)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...

    @overload
    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool = False) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """As everywhere; `skip_special_tokens` hides the visual ids too."""
        if isinstance(ids, (int, np.integer)):
            ids = _check_ids([ids])[0]  # NumPy's are no integers to the base class
        else:
            ids = self._without_visual_ids(_check_ids(ids)) if skip_special_tokens else _check_ids(ids)
        return super().convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        kwargs["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = _check_ids([token_ids] if isinstance(token_ids, (int, np.integer)) else token_ids)
        if skip_special_tokens:
            ids = self._without_visual_ids(ids)
        # Between added tokens as it was encoded: every stretch alone, without the space before its first word.
        added = {index: token.content for index, token in self.added_tokens_decoder.items() if not token.special}
        hidden = set(self.extra_special_tokens_ids) if skip_special_tokens else set()
        parts = []
        for is_added, stretch in groupby(ids, added.__contains__):
            if is_added:
                parts += [added[index] for index in stretch if index not in hidden]
            else:
                parts.append(super()._decode(list(stretch), skip_special_tokens=skip_special_tokens, **kwargs))
        return "".join(parts)

    def _without_visual_ids(self, ids: Sequence[int]) -> list[int]:
        first, end, placeholder = self.boi_token_id, self._code_ids.stop, self.image_token_id
        return [index for index in ids if not first <= index < end and index != placeholder]

    @property
    def _code_ids(self) -> range:
        first = self.visual_token_offset
        return range(first, first + self.codebook_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = self.split_special_tokens  # the backend does not pickle this


def _check_ids(ids: Iterable[Any]) -> list[int]:
    """Ids as integers of Python, none of which is negative or larger than any vocabulary."""
    checked = [_check_integer(index) for index in ids]
    if too_large := next((index for index in checked if index > _LARGEST_ID), None):
        raise ValueError(f"{too_large} is not a token id: it is larger than any vocabulary.")
    if negative := next((index for index in checked if index < 0), None):
        raise ValueError(
            f"{negative} is not a token id: ids are not negative. (Labels hold -100 where nothing is learned; replace "
            "it before decoding.)"
        )
    return checked


def _check_integer(value: Any) -> int:
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{value!r} is not a token id or code: these are integers.")
    return int(value)


def _shift(values: Any, by: int) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(value + by for value in values)
    return values + by


class IdRun(NamedTuple):
    """Consecutive ids of one kind.

    Attributes:
        kind: `"text"`; `"image"`; or `"features"`, an image of the prompt that entered as continuous features.
        ids: Text ids; codes (0 to K-1); or nothing for `"features"`.
    """

    kind: Literal["text", "image", "features"]
    ids: list[int]


class VisualIds(NamedTuple):
    """The ids that tell images from text: V, V+1, from V+2 on those of codes, and the placeholder's."""

    start: int
    end: int
    codes: range
    placeholder: int


def split_ids(ids: Iterable[int], visual: VisualIds, special_ids: Collection[int]) -> list[IdRun]:
    """Splits a row of ids into runs of text and images, in order.

    An image goes from its start to its end, or to the end of the row if it was cut off. Ids of text, and further
    starts, do not belong there; a model that is free to generate them may do so, and they are dropped as the original
    does. Codes outside start and end are an image, too, as in prompts for drawing; such a one ends at the next text.

    Args:
        ids: Prompt and new ids, or new ids alone.
        visual: The ids that matter.
        special_ids: The text tokenizer's control ids (padding, ...); between bare codes they are strays.
    """
    runs: list[IdRun] = []
    state = "text"  # or "image" between start and end, "bare" in codes without a start
    for index in ids:
        if index == visual.start:
            if state != "image":
                runs.append(IdRun("image", []))
                state = "image"
        elif index == visual.end:
            state = "text"
        elif index in visual.codes:
            if state == "text":
                runs.append(IdRun("image", []))
                state = "bare"
            runs[-1].ids.append(index - visual.codes.start)
        elif index == visual.placeholder:
            if state == "image":
                runs[-1] = IdRun("features", [])
        elif state == "text" or (state == "bare" and index not in special_ids):
            if state == "bare" or not runs or runs[-1].kind != "text":
                runs.append(IdRun("text", []))
            state = "text"
            runs[-1].ids.append(index)
    return runs


def as_rows(ids: Any) -> list[list[int]]:
    """Ids of one sequence or several (a tensor, an array, a list of these) as lists of ints.

    Raises:
        ValueError: There are more dimensions than these two.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids  # at once: one by one would wait for a GPU each time
    values = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    if not values or not isinstance(values[0], (list, tuple)):
        return [values]
    rows = [list(row) for row in values]
    if any(isinstance(index, (list, tuple)) for row in rows for index in row):
        raise ValueError("Expected the ids of a sequence, or of a batch of them; got more than two dimensions.")
    return rows


@contextmanager
def name_broken_file(checkpoint: str | os.PathLike, kind: str = "processor") -> Iterator[None]:
    """Finds out which file is to blame when the processor or the tokenizer of a directory cannot be loaded.

    Args:
        checkpoint: The directory; nothing is found out about a repository.
        kind: What of it is loaded: `"processor"` or `"tokenizer"`.

    Raises:
        OSError: If a file is no JSON, or not what it should be.
        ValueError: If the values in one of them cannot be used.
    """
    try:
        yield
    except Exception as error:
        folder = Path(checkpoint)
        needed, others = _FILES[kind]
        if folder.is_dir() and not any((folder / name).is_file() for name in needed):
            raise OSError(f"{folder} has no {needed[0]}: save the {kind} there, too.") from error
        if not folder.is_dir() or str(folder) in str(error):
            raise
        present = [folder / name for name in needed + others if (folder / name).is_file()]
        for file in present:
            read_json_object(file)
        for file in sorted(folder.glob("*.jinja")):
            try:
                file.read_text(encoding="utf-8")
            except ValueError as reason:
                raise OSError(f"{file} is not readable: {reason}") from error
        if (folder / TOKENIZER_FILE) in present:
            _check_tokenizer(folder / TOKENIZER_FILE)
        if not isinstance(error, AttributeError | LookupError | TypeError | ValueError):
            raise
        names = " or ".join(file.name for file in present if file.name != TOKENIZER_FILE)
        raise ValueError(
            f"{folder}: no {kind} can be made of what its files say ({names}): {type(error).__name__}: {error}"
        ) from error


def _check_tokenizer(file: Path) -> None:
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise OSError(f"{file} holds no tokenizer: {error}") from error


__all__ = ["LavitTokenizer"]
