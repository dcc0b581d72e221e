"""Evaluation by what the model writes, inside plain `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...processing.processing_lavit import ImageTextProcessor
from .sample_parts import Sample, read_sample

Score = Callable[[list[str], list[str]], dict[str, float]]


class GenerationMetrics:
    """Captions or answers for a dataset, scored: `compute_metrics` of a `Trainer`.

    `Seq2SeqTrainer(predict_with_generate=True)` is made for encoder-decoders: it would generate from rows that hold
    the answer. Here each row is cut before what is to be written. The metrics are logged, reported and used by
    `metric_for_best_model` like any others.

    ```python
    metrics = GenerationMetrics(model, processor, validation_set, score, max_new_tokens=32)
    trainer = Trainer(
        ..., compute_metrics=metrics, preprocess_logits_for_metrics=metrics.drop_logits  # nobody needs the logits
    )
    ```

    Args:
        model: The model that is trained.
        processor: Its processor.
        dataset: A `TrainingDataset` with images (or prompts alone), not codes. Each process takes its share.
        score: Called with what was written and with the dataset's texts; returns metrics by name.
        batch_size: Rows generated together.
        generate_kwargs: For `generate`; greedy by default.
    """

    def __init__(
        self,
        model: Any,
        processor: ImageTextProcessor,
        dataset: Sequence[Any],
        score: Score,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> None:
        self.model = model
        self.processor = processor
        self.dataset = dataset
        self.score = score
        self.batch_size = batch_size
        self.generate_kwargs = {"max_new_tokens": 64, "do_sample": False, **generate_kwargs}

    def __call__(self, prediction: Any = None) -> dict[str, float]:
        """Writes texts for the whole dataset and scores them; what `Trainer` predicted is not looked at."""
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        state = PartialState()
        indices = range(state.process_index, len(self.dataset), state.num_processes)
        written: list[tuple[str, str]] = []
        for start in range(0, len(indices), self.batch_size):
            samples = [read_sample(self.dataset[index]) for index in indices[start : start + self.batch_size]]
            written.extend(zip(self._write(samples), map(_reference, samples), strict=True))
        if state.num_processes > 1:
            written = gather_object(written)
        return self.score([text for text, _ in written], [reference for _, reference in written])

    @staticmethod
    def drop_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Keeps `Trainer` from collecting logits `[batch, sequence, vocabulary]` of the whole dataset."""
        return labels.new_zeros(len(labels))

    def _write(self, samples: list[Sample]) -> list[str]:
        prompts = [self._prompt(sample) for sample in samples]
        images = [image for sample in samples for image in sample.pictures] or None
        inputs = self.processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        is_training = self.model.training
        self.model.eval()
        output = self.model.generate(**inputs.to(self.model.device), **self.generate_kwargs)
        self.model.train(is_training)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompt(self, sample: Sample) -> str:
        if any(isinstance(picture, list) for picture in sample.pictures):
            raise ValueError(f"Sample {sample.sample_id} has codes; generation is evaluated on images.")
        if sample.messages is not None:
            return self.processor.apply_chat_template(sample.messages[:-1], add_generation_prompt=True)
        token = self.processor.image_token
        prompt = sample.prompt or ""
        return prompt if token in prompt else token * len(sample.pictures) + prompt


def _reference(sample: Sample) -> str:
    """What the dataset says."""
    if sample.messages is None:
        assert sample.text is not None
        return sample.text.strip()
    content = sample.messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)


__all__ = ["GenerationMetrics"]
