"""CIDEr-D, the main metric of captions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics import mean_and_scores
from lavit_hf.evaluation.metrics.captions import MAX_LENGTH, Tokens, check_tokenizer, count_ngrams, tokenize_captions

_DESCRIPTION = """
CIDEr-D: how similar a caption is to what humans wrote of the same image, with words that many images share counting
little (n-grams of 1 to 4 words, sigma 6, document frequencies from the references given). Gives the numbers of
pycocoevalcap on the same tokens; papers print them times 100.
"""
_CITATION = """
@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2015}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: One caption per image.
    references: A list of captions per image, all images of the benchmark together: their words decide what is rare.
Returns:
    cider: Mean over images, between 0 and 10.
    scores: The score of each image.
Example:
    >>> metric = load_metric("cider")
    >>> metric.compute(predictions=["a red bird", "two dogs"], references=[["a red bird"], ["two cats run"]])["cider"]
    4.253...
"""
_SIGMA = 6.0
Ngram = tuple[str, ...]


class TermWeights:
    """Weights n-grams by how few images have them in their references (TF-IDF).

    Args:
        references: Captions of every image.
    """

    def __init__(self, references: list[list[Tokens]]) -> None:
        self.log_images = math.log(len(references))
        self.num_images_with = Counter(
            ngram
            for captions in references
            for ngram in {ngram for tokens in captions for ngram in count_ngrams(tokens)}
        )

    def weigh(self, tokens: Tokens) -> list[dict[Ngram, float]]:
        """The vector of a caption: weights by n-gram, for every length."""
        vector: list[dict[Ngram, float]] = [{} for _ in range(MAX_LENGTH)]
        for ngram, count in count_ngrams(tokens).items():
            rarity = self.log_images - math.log(max(1, self.num_images_with[ngram]))
            vector[len(ngram) - 1][ngram] = count * rarity
        return vector


def cider_d(predictions: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    """CIDEr-D of every image (Vedantam et al., sections 4 and 6).

    Args:
        predictions: Tokens of one caption per image.
        references: Tokens of the captions that humans wrote, per image.

    Returns:
        A score between 0 and 10 per image.
    """
    weights = TermWeights(references)
    scores = []
    for tokens, captions in zip(predictions, references, strict=True):
        vector = weights.weigh(tokens)
        total = 0.0
        for caption in captions:
            # pycocoevalcap takes the number of bigrams for the length.
            difference = max(0, len(tokens) - 1) - max(0, len(caption) - 1)
            penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, vector, weights.weigh(caption))) / MAX_LENGTH
        scores.append(10 * total / len(captions))
    return scores


def _clipped_cosine(prediction: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    """Cosine, where repeating a word more often than the reference does earns nothing."""
    norms = math.hypot(*prediction.values()) * math.hypot(*reference.values())
    product = sum(
        min(weight, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, weight in prediction.items()
    )
    return product / norms if norms else 0.0


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Cider(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1411.5726", "https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        return mean_and_scores("cider", cider_d(*tokenize_captions(predictions, references, self.tokenizer)))
