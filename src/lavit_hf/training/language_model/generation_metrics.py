"""Evaluation by what the model writes, inside plain `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from transformers.utils import logging

from ...processing.processing_lavit import ImageTextProcessor
from ...utils.distributed import is_sharded
from ..dataset import complete_row, place_images

logger = logging.get_logger(__name__)

Score = Callable[[list[str], list[str]], dict[str, float]]


@dataclass
class _Question:
    """What the model reads of a sample: a prompt with images, or a chat that holds them; and what it should write."""

    prompt: Any
    answer: str
    images: Any = ()

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


class GenerationMetrics:
    """Captions or answers for a dataset, scored: `compute_metrics` of a `Trainer`.

    `Seq2SeqTrainer(predict_with_generate=True)` is made for encoder-decoders: it would generate from rows that hold
    the answer. Here each row is cut before what is to be written: of a chat that is the assistant's last text, asked
    for with everything before it, and of a text that says `<image>`, what follows its last image. Rows that ask
    nothing (text alone) or whose answer begins with an image are left out, with a warning. The metrics are logged,
    reported and used by `metric_for_best_model` like any others.

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
        score: Called with what was written and with what the dataset says; returns metrics by name.
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
        """Writes texts for the whole dataset and scores them; what `Trainer` predicted is not looked at.

        Raises:
            ValueError: If rows have codes instead of images, or no row can be asked about.
        """
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        if is_sharded(self.model):
            logger.warning_once(
                "A sharded model writes only if all processes do, as often as each other, which batches of an "
                "evaluation do not ensure: nothing is written, and the loss is all that is measured."
            )
            return {}
        state = PartialState()
        indices = range(state.process_index, len(self.dataset), state.num_processes)
        written: list[tuple[str, str]] = []
        for start in range(0, len(indices), self.batch_size):
            rows = [self.dataset[index] for index in indices[start : start + self.batch_size]]
            samples = [complete_row(row, needs_text=True) for row in rows]
            questions = [question for sample in samples if (question := self._ask(sample)) is not None]
            for _, group in groupby(questions, key=lambda question: question.is_chat):
                written.extend(self._write(list(group)))
        if state.num_processes > 1:
            written = gather_object(written)
        if not written:
            raise ValueError("No row of the dataset has an image or a prompt to ask with, and a text to expect.")
        if len(written) < len(self.dataset):
            logger.warning_once(
                f"{len(self.dataset) - len(written)} of {len(self.dataset)} rows ask nothing, or are answered by an "
                "image: evaluation leaves them out."
            )
        return self.score([text for text, _ in written], [reference for _, reference in written])

    @staticmethod
    def drop_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Keeps `Trainer` from collecting logits `[batch, sequence, vocabulary]` of the whole dataset."""
        return labels.new_zeros(len(labels))

    def _write(self, questions: list[_Question]) -> list[tuple[str, str]]:
        """What the model writes, with what it should."""
        prompts = [question.prompt for question in questions]
        options = {"padding": True, "padding_side": "left"}
        if questions[0].is_chat:
            inputs = self.processor.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={**options, "visual_mode": self._visual_modes(prompts)},
            )
        else:
            images = [image for question in questions for image in question.images] or None
            inputs = self.processor(images=images, text=prompts, return_tensors="pt", **options)
        is_training = self.model.training
        self.model.eval()
        output = self.model.generate(**inputs.to(self.model.device), **self.generate_kwargs)
        self.model.train(is_training)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [(text.strip(), question.answer) for text, question in zip(texts, questions, strict=True)]

    def _visual_modes(self, chats: list[list[dict[str, Any]]]) -> list[str]:
        """The model has drawn the images of the assistant itself, as codes."""
        return [
            "discrete" if message["role"] == "assistant" else self.processor.visual_mode
            for messages in chats
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]

    def _ask(self, sample: Mapping[str, Any]) -> _Question | None:
        if sample.get("codes") and not sample.get("images"):
            raise ValueError(f"Sample {sample['sample_id']} has codes; generation is evaluated on images.")
        question = _question_of_chat(sample) if "messages" in sample else self._question_of_text(sample)
        return question if question.prompt and question.answer else None

    def _question_of_text(self, sample: Mapping[str, Any]) -> _Question:
        token = self.processor.image_token
        images = sample.get("images", [])
        prompt, text = sample.get("prompt") or "", sample["text"]
        if "prompt" not in sample and token in text:
            before, _, text = text.rpartition(token)
            prompt = before + token
        elif token not in prompt + text:
            prompt = token * len(images) + prompt
        return _Question(prompt, text.partition(token)[0].strip(), images[: prompt.count(token)])


def _question_of_chat(sample: Mapping[str, Any]) -> _Question:
    """What comes before the assistant's last text; a turn of the user's after it is of no account."""
    messages = place_images(sample)
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {**part, "image": part["image"].image} if part["type"] == "image" else part
                for part in message["content"]
            ]
    answers = [_leading_text(message) if message["role"] == "assistant" else "" for message in messages]
    last = max((index for index, answer in enumerate(answers) if answer), default=0)
    return _Question(messages[:last], answers[last])


def _leading_text(message: dict[str, Any]) -> str:
    """What a message says, up to its first image."""
    if isinstance(message["content"], str):
        return message["content"].strip()
    parts = takewhile(lambda part: part["type"] != "image", message["content"])
    return " ".join(part.get("text") or "" for part in parts).strip()


__all__ = ["GenerationMetrics"]
