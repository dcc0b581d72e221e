"""Lemmas of answers, by spaCy: `dogs` and `dog`, `skiing` and `ski` count as the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from ..utils.atomic_files import write_json
from ..utils.json_files import read_json_object

PIPELINE = "en_core_web_sm"
_REPLACED = ("NOUN", "VERB")


class Lemmatizer:
    """Replaces nouns and verbs of answers by their lemmas, as the original does with answers and annotations.

    Args:
        pipeline: A pipeline of spaCy that tags and lemmatizes.
        version: Which one; what another version has cached is not used.
    """

    def __init__(self, pipeline: Any, version: str) -> None:
        self._pipeline = pipeline
        self.version = version

    @classmethod
    def load(cls) -> Lemmatizer:
        """Loads spaCy's small English pipeline.

        Raises:
            ImportError: spaCy or its pipeline is not installed.
        """
        try:
            import spacy  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("Lemmas need spaCy: pip install 'lavit-hf[protocol]'.") from error
        try:
            pipeline = spacy.load(PIPELINE)
        except OSError as error:
            raise ImportError(
                f"Lemmas need spaCy's pipeline {PIPELINE}, which is installed by itself: "
                f"python -m spacy download {PIPELINE}"
            ) from error
        return cls(pipeline, f"{PIPELINE}-{pipeline.meta['version']}-spacy-{spacy.__version__}")

    def __call__(self, texts: Iterable[str]) -> list[str]:
        """Lemmatizes texts.

        Args:
            texts: Answers. What occurs several times is looked at once.

        Returns:
            All tokens of each, joined by spaces, nouns and verbs as lemmas.
        """
        texts = list(texts)
        distinct = list(dict.fromkeys(texts))
        lemmas = dict(zip(distinct, map(_lemmatize, self._pipeline.pipe(distinct)), strict=True))
        return [lemmas[text] for text in texts]

    def cached(self, texts: Sequence[str]) -> list[str]:
        """Lemmatizes the annotations of a benchmark, or takes what an earlier run has found from the cache.

        Args:
            texts: Annotations.

        Returns:
            As above. They are kept in the assets of the Hugging Face cache (`HF_ASSETS_CACHE`).

        Raises:
            ValueError: The file in the cache is damaged.
        """
        distinct = sorted(set(texts))
        digest = hashlib.sha256(json.dumps(distinct).encode()).hexdigest()[:16]
        folder = Path(cached_assets_path("lavit_hf", namespace="lemmas", subfolder=self.version))
        file = folder / f"{digest}.json"
        if not file.exists():
            write_json(file, dict(zip(distinct, self(distinct), strict=True)))
        lemmas = read_json_object(file, ValueError)
        if set(lemmas) != set(distinct) or not all(isinstance(lemma, str) for lemma in lemmas.values()):
            raise ValueError(f"{file} does not hold the lemmas of these annotations; remove it.")
        return [lemmas[text] for text in texts]


def _lemmatize(document: Iterable[Any]) -> str:
    return " ".join(token.lemma_ if token.pos_ in _REPLACED else token.text for token in document)


__all__ = ["PIPELINE", "Lemmatizer"]
