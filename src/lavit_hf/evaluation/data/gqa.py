"""Questions as GQA has them: https://cs.stanford.edu/people/dorarad/gqa/download.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import read_field, read_kind
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
        ValueError: A question has no answer, a field is missing or of another type, or an image is not in `folder`.
    """
    samples = []
    for question_id, asked in list(content.items())[:num_samples]:
        where = f"Question {question_id}"
        question = read_field(asked, "question", str, where)
        if "answer" not in asked:
            raise ValueError(f"{where} has no answer; GQA publishes those of val and testdev only.")
        samples.append(
            EvaluationSample(
                question_id,
                find_image(folder, where, f"{read_field(asked, 'imageId', str, where)}.jpg"),
                references=(read_field(asked, "answer", str, where),),
                question=question,
                meta={"kind": read_kind(asked.get("types") or {}, "structural", where)},
            )
        )
    return samples
