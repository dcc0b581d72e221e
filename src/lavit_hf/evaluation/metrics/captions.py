"""Words and n-grams of captions, counted as the caption benchmarks count them.

pycocoevalcap runs the Java class `PTBTokenizer` of Stanford CoreNLP 3.4.1 with `-lowerCase` and drops punctuation from
what it returns. `tokenize_caption` does the same in Python, without Java, for English sentences. The tests compare it
with recorded output of the Java class, which it equals on ordinary captions, and on nine in ten that were made to be
hard. Known to differ: smileys, telephone numbers, marks right behind addresses, superscripts, and the period of a
single letter at a caption's end, where the Java class looks at the next caption. So the protocol of published numbers
runs the Java class itself: `tokenizer="ptb"`.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

# What pycocoevalcap drops; ".." is "..." to the Java class. Longer runs of other marks ("!!", "?!") stay, there as
# well, and so do brackets: lower-casing makes `-lrb-` of `-LRB-`, which is what pycocoevalcap looks for.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "..", "...", "?", "!", ",", ":", ";", "-", "--"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHY = str.maketrans(
    {
        '"': "``",
        "\N{LEFT DOUBLE QUOTATION MARK}": "``",
        "\N{RIGHT DOUBLE QUOTATION MARK}": "``",
        "\N{LEFT SINGLE QUOTATION MARK}": "`",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EN DASH}": "--",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{NO-BREAK SPACE}": " ",
        "\n": " ",
        "\N{POUND SIGN}": "#",  # as Penn Treebank writes currencies
        "\N{EURO SIGN}": "$",
        "\N{VULGAR FRACTION ONE QUARTER}": "1/4",
        "\N{VULGAR FRACTION ONE HALF}": "1/2",
        "\N{VULGAR FRACTION THREE QUARTERS}": "3/4",
    }
)

_TOKEN = re.compile(
    r"""
    https?://[^\s<>]*[\w/]                         # addresses
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
  | ph\.d\. | (?:[^\W\d_]\.){2,}                   # u.s., p.m.
  | [#@][^\W\d_]\w* | \bc\+\+
  | [-+]\d+(?:[.,:]\d+)*(?![\w-])                  # signs belong to numbers
  | \b(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|vs|etc|ave|rd|blvd|rt|mt|inc|co|corp|ltd|dept|approx)\.
  | \bno\.(?=\s*\d)
  | (?<![\w'])[^\W\d_]\.(?!\w)                     # initials
  | \d+(?:[.,:]\d+)+                               # 12.50, 1,000, 2:50
  | '\d\ds\b                                       # '90s
  | \b(?:ain't|[^\W\d_]+n't)\b | \w+(?:[-/&_.]\w+)*(?:'[^\W\d]\w*)* | '(?:s|m|d|ll|re|ve|em|n|twas|tis)\b'?
  | \.{2,} | -{2,} | ''|`` | [?!]+ | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?=$|')")
_CONTRACTED = {
    word.replace(" ", ""): word.split()
    for word in ("can not", "gon na", "got ta", "wan na", "lem me", "gim me", "d' ye", "y' all", "'t is", "'t was")
}


def tokenize_caption(text: str) -> list[str]:
    """Splits a caption into lower-case words, without punctuation.

    Args:
        text: A caption.

    Returns:
        Its tokens; `"The man's dog."` gives `["the", "man", "'s", "dog"]`.
    """
    tokens: list[str] = []
    for match in _TOKEN.findall(text.translate(_TYPOGRAPHY).lower()):
        tokens.extend(_split_word(match))
    return [token for token in tokens if token not in _DROPPED and token.strip("-.")]


def _split_word(word: str) -> list[str]:
    if word in _CONTRACTED:
        return _CONTRACTED[word]
    if word in _BRACKETS:
        return [_BRACKETS[word]]
    return [part for part in _CLITIC.split(word) if part]


Tokens = list[str]
MAX_LENGTH = 4  # the caption metrics look at sequences of one to four words


def count_ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Counts all sequences of 1 to 4 words."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, MAX_LENGTH + 1)
        for start in range(len(tokens) - length + 1)
    )


TOKENIZERS = ("python", "ptb")


def check_tokenizer(name: str) -> None:
    """Makes sure that captions can be tokenized.

    Raises:
        ImportError: pycocoevalcap or Java is not installed, and `name` is `"ptb"`.
        ValueError: There is no such tokenizer.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"There is no tokenizer {name!r} of captions; there are {', '.join(TOKENIZERS)}.")
    if name == "ptb":
        _load_ptb()


def _load_ptb() -> Any:
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("The tokenizer of pycocoevalcap needs it: pip install 'lavit-hf[protocol]'.") from error
    if shutil.which("java") is None:
        raise ImportError(
            "The tokenizer of pycocoevalcap runs `java`, which is not installed; on Debian and Ubuntu it is "
            "in the package default-jre-headless."
        )
    return PTBTokenizer()


def tokenize_captions(
    predictions: list[str], references: list[list[str]], tokenizer: str = "python"
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Tokenizes predictions and their references.

    Args:
        predictions: One caption per image.
        references: Captions of every image.
        tokenizer: `"python"` for [`tokenize_caption`], or `"ptb"` for pycocoevalcap's own, which runs Java.

    Raises:
        ImportError: As for [`check_tokenizer`].
        ValueError: There are no predictions, one has no reference, or there is no such tokenizer.
    """
    check_tokenizer(tokenizer)
    if not predictions:
        raise ValueError("There is no caption to score.")
    if not all(references):
        raise ValueError(f"Caption {[bool(captions) for captions in references].index(False)} has no reference.")
    if tokenizer == "ptb":
        return [tokens for (tokens,) in _run_ptb([[caption] for caption in predictions])], _run_ptb(references)
    return (
        [tokenize_caption(caption) for caption in predictions],
        [[tokenize_caption(caption) for caption in captions] for captions in references],
    )


def _run_ptb(captions: list[list[str]]) -> list[list[Tokens]]:
    """Tokenizes all at once, as pycocoevalcap does: the Java class looks beyond the end of a caption."""
    by_image = {index: [{"caption": text} for text in of_image] for index, of_image in enumerate(captions)}
    found = _load_ptb().tokenize(by_image)
    tokens = [[text.split() for text in found.get(index, [])] for index in by_image]
    if list(map(len, tokens)) != list(map(len, captions)):
        raise ValueError("The tokenizer of pycocoevalcap did not return all captions; what java printed says why.")
    return tokens


__all__ = [
    "MAX_LENGTH",
    "TOKENIZERS",
    "Tokens",
    "check_tokenizer",
    "count_ngrams",
    "tokenize_caption",
    "tokenize_captions",
]
