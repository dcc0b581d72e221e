"""Task `caption`: describe an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.scenes import Scene
from ...pipelines.image_to_text import CAPTION, first_sentence, generate_text
from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement
from ..scenes.facts import Comparison, compare_facts, measure_facts, read_facts, wrong_parts
from ..tokens import measure_tokens, tokenize
from .base import Prediction, Record, Shown, Task
from .text_scores import score_texts

# Captions of scenes are from 8 to 23 words, each of which may be several tokens.
_SCENES = {"min_new_tokens": 1, "max_new_tokens": 64}


class CaptionTask(Task):
    """Describes images; of scenes, every fact is checked."""

    name = "caption"
    own_options = tuple(CAPTION)

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**CAPTION, **_SCENES} if data.is_scenes else dict(CAPTION)

    def metric_options(self) -> dict[str, dict[str, Any]]:
        return {} if self.data.is_scenes else {name: {} for name in self.data.caption_metrics}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        model, processor = checkpoint.model, checkpoint.processor
        images = [sample.open_image() for sample in samples]
        texts = generate_text(model, processor, images, [""] * len(images), self.options)
        return [
            Prediction({"prediction": first_sentence(text), **tokens})
            for text, tokens in zip(texts, tokenize(model, processor, images), strict=True)
        ]

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found: dict[str, Measurement] = {}
        if self.data.is_scenes:
            found.update(measure_facts(map(_compare, records)))
        else:
            for name, metric in self.metrics.items():
                found.update(score_texts(name, metric, records))
        return {**found, **measure_tokens(records, checkpoint.codebook_size)}

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        shown = Shown([("picture", sample.open_image())], [("caption", record["prediction"])])
        shown.lines += [("reference", text) for text in record["references"][:1]]
        if self.data.is_scenes:
            wrong = wrong_parts(_compare(record))
            shown.is_right = not wrong
            shown.lines += [("wrong", ", ".join(wrong))] if wrong else []
        return shown


def _compare(record: Record) -> Comparison:
    return compare_facts(read_facts(record["prediction"]), Scene.from_dict(record["meta"]["scene"]))


__all__ = ["CaptionTask"]
