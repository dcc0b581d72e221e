"""LaVIT's tokenizer: the language model's text tokenizer with the visual vocabulary behind it.

With V text ids and K codes: `<img>` is V, `</img>` V+1, `<visual_c>` V+2+c, and `<image>`, the placeholder that a
feature replaces, V+2+K. Models without a row for V+2+K, as the published ones, have `<image>` in place of a row of
text that no text becomes.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ..modeling.checkpoint_files import IS_PACKAGE, RemoteCodeMixin
from .checkpoint_processor import name_broken_file
from .generated_ids import IdRun, VisualIds, as_rows, split_ids
from .text_vocabulary import (
    BOI_TOKEN,
    EOI_TOKEN,
    IMAGE_TOKEN,
    check_text,
    extend_with_visual_tokens,
    read_sentencepiece,
)

# How a tokenizer was loaded, which the base class keeps among its settings; remote code needs the last one there.
_REMOTE_CODE_KWARGS = ("auto_map",) if IS_PACKAGE else ()
_LOADING_KWARGS = ("is_local", "local_files_only", "trust_remote_code", "added_tokens_decoder", *_REMOTE_CODE_KWARGS)
_LARGEST_ID = 2**32 - 1  # the backend knows no larger ones
_VISUAL_NAME = re.compile(r"</?img>|<visual_\d+>")
_Codes = TypeVar("_Codes", int, list[int], tuple[int, ...], np.ndarray, torch.Tensor)


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
        if self._tokenizer.token_to_id(IMAGE_TOKEN) is None:
            raise ValueError(
                "This tokenizer has no visual vocabulary; make one with `LavitTokenizer.from_text_tokenizer` or "
                "`LavitTokenizer.from_sentencepiece`."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
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
    ) -> "LavitTokenizer":
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
    ) -> "LavitTokenizer":
        """Extends a BPE text tokenizer of transformers; the ids of its tokens, added ones included, stay.

        Args:
            text_tokenizer: A tokenizer backed by the `tokenizers` library.
            codebook_size: Number of visual codes K.
            text_vocab_size: V, if the language model has more embedding rows than the tokenizer has ids.
            image_token_id: The model's; V+2+K by default. Another one has to be the tokenizer's unknown token.
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
    ) -> "LavitTokenizer":
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

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As everywhere, but `extra_special_tokens` are your own: they may be typed.

        Raises:
            ValueError: If one of them is a token of images.
        """
        for name in ("extra_special_tokens", "additional_special_tokens"):  # before anything changes
            for token in special_tokens_dict.get(name) or ():
                self._check_declared(str(token))
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds a caller's tokens so that text becomes them, and the named ones (BOS, EOS, ...) so that it does not."""
        named = {str(token) for token in self._special_tokens_map.values() if token}
        declared, control = [], []
        for token in new_tokens:
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

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
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


__all__ = ["LavitTokenizer"]
