"""The text handling of the original's evaluation: how it puts questions, and what it makes of answers.

Written from a description and from recorded inputs and outputs, which the tests hold it to. Between cutting an answer
and comparing it stand lemmas, which are in `lemmas.py`:

```text
question -> original_question -> question_prompt -> model -> cut_original_answer -> Lemmatizer -> original_vqa_accuracy
```
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .metrics.answers import mean_agreement, normalize_answer, remove_punctuation, strip_answer

_NOT_ASKED = re.compile(r'[.!"()*#:;~]')
_MAX_WORDS = 50
_ANSWER_ENDS = ("\n", "question:", "Long answer:", ",", ".")
# What an answer may begin with that is not compared: each is looked for once, in this order, so that of "it is in red"
# "red" remains, and of "in it is red" "it is red". The recordings have all of them but "he 's ", which goes with
# "she 's ", and do not tell the order of the last six among themselves. A space stands before "'s", as lemmatized
# answers are tokens joined by spaces.
_OPENINGS = ("it is ", "they are ", "this is ", "he 's ", "she 's ", "in ", "on ", "at ", "to ", "for ", "very ")
UNANSWERABLE = "unanswerable"
"""The answer that stands for none: what most humans wrote below pictures that do not answer a question."""
_NO_ANSWERS = ("", "i do n't know")


def original_question(text: str) -> str:
    """Writes a question as the original puts it.

    Args:
        text: A question of a benchmark.

    Returns:
        It in lower case, without the characters `. ! " ( ) * # : ; ~` and spaces at the end, of at most 50 words.
        White space elsewhere stays as it is.
    """
    return " ".join(_NOT_ASKED.sub("", text.lower()).rstrip(" ").split(" ")[:_MAX_WORDS])


def cut_original_answer(text: str) -> str:
    """Takes the answer out of what the model wrote.

    Args:
        text: What it wrote.

    Returns:
        What stands before the first line break, `question:`, `Long answer:`, comma and period, in lower case: looked
        for in this order and as they are written here. Before lemmas.
    """
    text = text.strip()
    for end in _ANSWER_ENDS:
        text = text.partition(end)[0]
    return text.lower()


def normalize_original_answer(text: str) -> str:
    """Brings an answer into the form in which the original compares it with those of humans.

    Args:
        text: An answer, cut and lemmatized.

    Returns:
        It as the official evaluation of VQAv2 normalizes it, without openings such as "it is" and "in";
        `"unanswerable"` if nothing is left, or if it is "i do n't know".
    """
    answer = normalize_answer(text)
    for opening in _OPENINGS:
        answer = answer.removeprefix(opening)
    return UNANSWERABLE if answer in _NO_ANSWERS else answer


def original_vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Scores an answer to a question of VQAv2, OK-VQA or VizWiz.

    Args:
        prediction: The answer, cut and lemmatized.
        references: The answers of ten humans, lemmatized.

    Returns:
        The official accuracy in percent, between 0 and 100. Unlike in the official evaluation, the prediction is
        always normalized, by [`normalize_original_answer`], and of humans' answers only the punctuation, if they
        disagree.

    Raises:
        ValueError: There are too few references for a right answer to reach 100.
    """
    answers = [strip_answer(answer) for answer in references]
    if len(set(answers)) > 1:
        answers = [remove_punctuation(answer) for answer in answers]
    return round(100 * mean_agreement(normalize_original_answer(prediction), answers), 2)


def original_exact_match(prediction: str, reference: str) -> float:
    """Scores an answer to a question of GQA.

    Args:
        prediction: The answer, cut and lemmatized; it is normalized here.
        reference: The right answer, lemmatized; it is compared as it is.

    Returns:
        100 or 0.
    """
    return 100.0 * (normalize_original_answer(prediction) == reference)


__all__ = [
    "UNANSWERABLE",
    "cut_original_answer",
    "normalize_original_answer",
    "original_exact_match",
    "original_question",
    "original_vqa_accuracy",
]
