"""Tasks by the protocol behind the published numbers, and what a run does otherwise.

Captions differ from the plain task in how they are scored; questions in how they are put, cut, lemmatized and scored;
drawings in what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from transformers import CLIPConfig

from .benchmarks import Benchmark
from .checkpoint import EvaluatedCheckpoint
from .data.samples import EvaluationData, EvaluationSample
from .lemmas import Lemmatizer
from .metrics.captions import check_tokenizer
from .protocol import (
    UNANSWERABLE,
    cut_original_answer,
    original_exact_match,
    original_question,
    original_vqa_accuracy,
)
from .tasks import PLAIN, VISUAL_MODE, CaptionTask, Prediction, Record, Task, TextToImageTask, VqaTask

LAVIT = "lavit"
PROTOCOLS = (LAVIT, PLAIN)
_DTYPE = "bfloat16"
_REAL_SIZE = (512, 512)
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}


class OriginalCaptionTask(CaptionTask):
    """Describes images as always; captions are scored by the Java tokenizer of pycocoevalcap.

    Args:
        data: Captions of a benchmark.
        options: As for other tasks.
        seed: As for other tasks.

    Raises:
        ImportError: The tokenizer, or Java, is not installed.
    """

    protocol = LAVIT

    def __init__(self, data: EvaluationData, options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        check_tokenizer("ptb")
        super().__init__(data, options, seed)

    def metric_options(self) -> dict[str, dict[str, Any]]:
        return {name: {"tokenizer": "ptb"} for name in self.data.caption_metrics}


class OriginalVqaTask(VqaTask):
    """Answers questions as the original puts them; answers and annotations are compared by their lemmas.

    Args:
        data: Questions of a benchmark.
        options: As for other tasks.
        seed: As for other tasks.

    Raises:
        ImportError: There is nothing to lemmatize with.
    """

    protocol = LAVIT

    def __init__(self, data: EvaluationData, options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        self._lemmatizer = Lemmatizer.load()
        self._first_question = data.benchmark.first_question if data.benchmark is not None else None
        super().__init__(_lemmatized(data, self._lemmatizer), options, seed)

    @property
    def questions_per_sample(self) -> int:
        return 1 if self._first_question is None else 2

    def settings(self) -> dict[str, Any]:
        own = {"lemmas": self._lemmatizer.version, "first_question": self._first_question}
        return {**super().settings(), "protocol": self.protocol, **own}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        images = [sample.open_image() for sample in samples]
        questions = [sample.question or "" for sample in samples]
        predictions = [Prediction({"prediction": answer}) for answer in self._answer(checkpoint, images, questions)]
        if self._first_question is not None:
            first = [self._first_question.format(question) for question in questions]
            for prediction, answer in zip(predictions, self._answer(checkpoint, images, first), strict=True):
                prediction.values.update(first_answer=answer)
                if "no" in answer:  # the original's rule, which takes "know" for a no, too: docs/evaluation.md
                    prediction.values.update(prediction=UNANSWERABLE, answer=prediction.values["prediction"])
        return predictions

    def _answer(
        self, checkpoint: EvaluatedCheckpoint, images: Sequence[Image.Image], questions: Sequence[str]
    ) -> list[str]:
        texts = self.ask(checkpoint, images, [original_question(question) for question in questions])
        return self._lemmatizer([cut_original_answer(text) for text in texts])

    def score_answers(self, records: Sequence[Record]) -> list[float]:
        if self.data.answer_metric == "exact_match":
            percent = [original_exact_match(record["prediction"], record["references"][0]) for record in records]
        else:
            percent = [original_vqa_accuracy(record["prediction"], record["references"]) for record in records]
        return [score / 100 for score in percent]


def _lemmatized(data: EvaluationData, lemmatizer: Lemmatizer) -> EvaluationData:
    """The same questions with lemmas of their answers."""
    samples = list(data.samples)
    lemmas = iter(lemmatizer.cached([text for sample in samples for text in sample.references]))
    return replace(
        data,
        samples=[replace(sample, references=tuple(next(lemmas) for _ in sample.references)) for sample in samples],
    )


class OriginalTextToImageTask(TextToImageTask):
    """Draws as always; the real images are squashed to the size of drawings before the FID sees them."""

    protocol = LAVIT

    def real_image(self, sample: EvaluationSample) -> Image.Image:
        return super().real_image(sample).resize(_REAL_SIZE, Image.Resampling.BICUBIC)


ORIGINAL_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (OriginalCaptionTask, OriginalVqaTask, OriginalTextToImageTask)
}


def describe_protocol(task: Task, checkpoint: EvaluatedCheckpoint) -> dict[str, Any]:
    """Says by which protocol a benchmark was evaluated.

    Args:
        task: A task whose data are a benchmark.
        checkpoint: The checkpoint that was asked.

    Returns:
        What `metrics.json` says: names of protocol and benchmark, the published numbers of its metric, and every
        deviation from how these were measured.
    """
    benchmark = task.data.benchmark
    assert benchmark is not None
    return {
        "name": task.protocol,
        "benchmark": benchmark.name,
        "metric": benchmark.metric,
        "scale": benchmark.scale,
        "published": dict(benchmark.published),
        "deviations": _deviations(benchmark, task, checkpoint),
    }


_PLAIN = {
    "caption": "captions are split into words by a tokenizer in Python",
    "vqa": "questions are put as they are written; answers and annotations are neither cut nor lemmatized",
    "text-to-image": "real images keep their sizes",
}


def _deviations(benchmark: Benchmark, task: Task, checkpoint: EvaluatedCheckpoint) -> list[str]:
    found = [_PLAIN[benchmark.task]] if task.protocol == PLAIN else []
    if task.protocol == PLAIN and benchmark.first_question is not None:
        found.append("nobody asks first whether a question can be answered")
    found += benchmark.deviations
    if task.sees_images:
        selection = checkpoint.model.config.visual_tokenizer_config.selection
        found.append(f"patches are selected by {selection!r}, always the same ones; the original samples them")
    if len(task.data.samples) != benchmark.num_samples:
        found.append(f"{len(task.data.samples)} samples instead of {benchmark.num_samples}")
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    if dtype != _DTYPE:
        found.append(f"computed in {dtype} instead of {_DTYPE}")
    defaults = task.default_options(task.data)
    for name, value in task.options.items():
        if value != defaults[name] and name not in ("clip", "fid_weights", VISUAL_MODE):
            found.append(f"{name} is {value} instead of {defaults[name]}")
    mode = task.options.get(VISUAL_MODE) or checkpoint.processor.visual_mode
    if task.sees_images and mode != "continuous":
        found.append(f"images are read as {mode} codes instead of features")
    if isinstance(task, TextToImageTask) and task.options["clip"] is not None:
        found += _other_clip(task.options["clip"])
    return found


def _other_clip(name_or_path: str) -> list[str]:
    """What of a CLIP is not that of ViT-L/14, which chose among the drawings of the paper."""
    vision = CLIPConfig.from_pretrained(name_or_path).vision_config
    found = {name: getattr(vision, name) for name in _VIT_L}
    return [] if found == _VIT_L else [f"CLIP is not ViT-L/14: {', '.join(f'{k} {v}' for k, v in found.items())}"]


__all__ = [
    "LAVIT",
    "ORIGINAL_TASKS",
    "PLAIN",
    "PROTOCOLS",
    "OriginalCaptionTask",
    "OriginalTextToImageTask",
    "OriginalVqaTask",
    "describe_protocol",
]
