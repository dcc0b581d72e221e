"""Task `vqa`: answer questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...pipelines.image_to_text import ANSWER, answer_of, answer_options, generate_text, question_prompt
from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement, measure_mean
from .base import Prediction, Record, Shown, Task

# Answers about scenes are one or two words, among which a search would find nothing better. The release forbids to end
# before the second token, which with words as tokens would be one word too many.
_SCENES = {"num_beams": 1, "min_new_tokens": 1}
_RIGHT = 0.5  # from this score on an answer is not marked as wrong on the page of samples


class VqaTask(Task):
    """Answers questions; besides all of them, every kind of question is scored by itself."""

    name = "vqa"
    own_options = tuple(ANSWER)

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**ANSWER, **_SCENES} if data.is_scenes else dict(ANSWER)

    def metric_options(self) -> dict[str, dict[str, Any]]:
        return {self.data.answer_metric: {}}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        images = [sample.open_image() for sample in samples]
        prompts = [question_prompt(sample.question or "") for sample in samples]
        options = answer_options(self.options)
        texts = generate_text(checkpoint.model, checkpoint.processor, images, prompts, options)
        return [Prediction({"prediction": answer_of(text)}) for text in texts]

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        metric, scores = self.data.answer_metric, self._scores(records)
        kinds = [record["meta"].get("kind") for record in records]
        found = {metric: measure_mean(scores, "questions", is_share=True)}
        for kind in dict.fromkeys(kind for kind in kinds if kind is not None):
            of_kind = [score for score, its in zip(scores, kinds, strict=True) if its == kind]
            found[f"{metric}/{kind}"] = measure_mean(of_kind, "questions", is_share=True)
        return found

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        (score,) = self._scores([record])
        lines = [("question", record["question"]), ("answer", record["prediction"])]
        lines += [("right answer", ", ".join(dict.fromkeys(record["references"])))]
        return Shown([("picture", sample.open_image())], lines, is_right=score >= _RIGHT)

    def _scores(self, records: Sequence[Record]) -> list[float]:
        """From 0 to 1 for each answer."""
        result = self.metrics[self.data.answer_metric].compute(
            predictions=[record["prediction"] for record in records],
            references=[record["references"] for record in records],
        )
        return result["scores"]


__all__ = ["VqaTask"]
