"""The official normalization of answers to questions about images, and how far they agree.

Written from the rules of https://visualqa.org/evaluation.html and equal, oddities included, to what the official
evaluation (https://github.com/GT-Vision-Lab/VQA) does; the tests compare it with recorded results of that code.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset(["a", "an", "the"])
# An answer that lacks one of the apostrophes gets it back: "dont", "couldnt've" and "couldn'tve".
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 - a list would be ninety lines
_MISSING_APOSTROPHE = {
    word[: match.start()] + word[match.end() :]: word for word in _CONTRACTIONS for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=2**16)  # ten humans give the same answers again and again
def normalize_answer(text: str) -> str:
    """Brings an answer into the form in which answers are compared.

    Args:
        text: An answer, of a model or of a human.

    Returns:
        It in lower case, without punctuation and articles, numbers up to ten as digits, apostrophes put back.
    """
    words = [_NUMBERS.get(word, word) for word in remove_punctuation(strip_answer(text)).lower().split()]
    return " ".join(_MISSING_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def strip_answer(text: str) -> str:
    """Removes white space around an answer, and line breaks and tabs in it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def remove_punctuation(text: str) -> str:
    """Removes punctuation, or puts a space in its place, as the official evaluation does."""
    has_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        stands_apart = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if stands_apart or has_number_with_comma else " ")
    return _PERIOD.sub("", result)


_FEWEST_ANSWERS = 4  # with one left out, fewer than three others could agree


def mean_agreement(prediction: str, answers: list[str]) -> float:
    """How far an answer agrees with three of the other humans, averaged over leaving out each.

    Args:
        prediction: The answer to judge, normalized.
        answers: The answers of humans, in the form that is compared.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: There are too few answers for a right one to reach 1.
    """
    if len(answers) < _FEWEST_ANSWERS:
        raise ValueError(
            f"VQA accuracy needs the answers of several humans, {_FEWEST_ANSWERS} at least, not {answers}; for "
            "questions with one answer there is exact_match."
        )
    matches = answers.count(prediction)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)


__all__ = ["mean_agreement", "normalize_answer", "remove_punctuation", "strip_answer"]
