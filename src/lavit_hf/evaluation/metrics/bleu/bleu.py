"""BLEU of captions."""

from __future__ import annotations

import math
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics.captions import MAX_LENGTH, Tokens, check_tokenizer, count_ngrams, tokenize_captions

_DESCRIPTION = """
BLEU: the share of n-grams that occur in a reference, over the whole corpus, with a penalty for captions shorter than
the reference closest in length. Gives the numbers of pycocoevalcap on the same tokens; papers print BLEU-4 times 100.
"""
_CITATION = """
@inproceedings{papineni2002bleu,
  title={{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={Annual Meeting of the Association for Computational Linguistics},
  year={2002}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: One caption per image.
    references: A list of captions per image.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4: Between 0 and 1; no means over images, so without `scores`.
Example:
    >>> metric = load_metric("bleu")
    >>> metric.compute(predictions=["a red bird sits"], references=[["a red bird sits", "a bird"]])["bleu_4"]
    0.9999...
"""
# pycocoevalcap's, so that no n-grams in common give a tiny number instead of a division by zero.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(predictions: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al., section 2).

    Args:
        predictions: Tokens of one caption per image.
        references: Tokens of the captions that humans wrote, per image.

    Returns:
        Four numbers between 0 and 1.
    """
    matches, totals = [0] * MAX_LENGTH, [0] * MAX_LENGTH
    length = reference_length = 0
    for tokens, captions in zip(predictions, references, strict=True):
        counts = [count_ngrams(caption) for caption in captions]
        for ngram, count in count_ngrams(tokens).items():
            totals[len(ngram) - 1] += count
            matches[len(ngram) - 1] += min(count, max(caption_counts[ngram] for caption_counts in counts))
        length += len(tokens)
        reference_length += min(map(len, captions), key=lambda other: (abs(other - len(tokens)), other))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(match + _TINY) / (total + _SMALL) for match, total in zip(matches, totals, strict=True)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_LENGTH + 1)]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Bleu(evaluate.Metric):
    def __init__(self, *args: Any, tokenizer: str = "python", **kwargs: Any) -> None:
        check_tokenizer(tokenizer)
        super().__init__(*args, **kwargs)
        self.tokenizer = tokenizer

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://aclanthology.org/P02-1040", "https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        values = bleu(*tokenize_captions(predictions, references, self.tokenizer))
        return {f"bleu_{n}": value for n, value in enumerate(values, start=1)}
