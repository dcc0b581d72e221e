"""Questions as GQA has them: https://cs.stanford.edu/people/dorarad/gqa/download.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .image_files import find_image
from .sample import EvaluationSample


def is_gqa(content: Any) -> bool:
    """Whether this is `{question id: {"imageId", "question", "answer"}}`."""
    if not isinstance(content, dict) or not content:
        return False
    value = next(iter(content.values()))
    return isinstance(value, dict) and "imageId" in value and "question" in value


def read_gqa(content: dict[str, Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """One sample per question, in the file's order.

    Raises:
        ValueError: A question has no answer, or an image is missing in `folder`.
    """
    samples = []
    for question_id, asked in list(content.items())[:num_samples]:
        if "answer" not in asked:
            raise ValueError(f"Question {question_id} has no answer; GQA publishes those of val and testdev only.")
        samples.append(
            EvaluationSample(
                question_id,
                find_image(folder, f"Question {question_id}", f"{asked['imageId']}.jpg"),
                references=(asked["answer"],),
                question=asked["question"],
                meta={"kind": asked.get("types", {}).get("structural", "other")},
            )
        )
    return samples
