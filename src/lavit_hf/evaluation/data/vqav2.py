"""Questions as VQAv2 and OK-VQA have them, in two files: https://visualqa.org/vqa_v2_teaser.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import read_field, read_kind, read_texts
from .image_files import find_image
from .sample import EvaluationSample


def is_vqav2(content: Any) -> bool:
    """Whether this is `{"questions": [{"question_id", "image_id", "question"}]}`."""
    return isinstance(content, dict) and bool(content.get("questions")) and "question_id" in content["questions"][0]


def read_vqav2(
    content: dict[str, Any], annotations: dict[str, Any], folder: Path, num_samples: int | None = None
) -> list[EvaluationSample]:
    """One sample per question, in the file's order.

    Args:
        content: The file of questions.
        annotations: The file of answers, ten per question.
        folder: Where the images are, named as COCO names them.
        num_samples: How many at most.

    Raises:
        ValueError: A question has no answers, a field is missing or of another type, or an image is not in `folder`.
    """
    answers = {}
    for index, annotation in enumerate(read_field(annotations, "annotations", list, "The file of --annotations")):
        where = f"annotations[{index}] of --annotations"
        answers[read_field(annotation, "question_id", int, where)] = (annotation, where)
    subtype = content.get("data_subtype", "val2014")
    samples = []
    for index, asked in enumerate(content["questions"][:num_samples]):
        where = f"questions[{index}]"
        question_id = read_field(asked, "question_id", int, where)
        if question_id not in answers:
            raise ValueError(f"Question {question_id} has no answers; are --annotations of the same split?")
        annotation, where_answered = answers[question_id]
        number = f"{read_field(asked, 'image_id', int, where):012d}"
        samples.append(
            EvaluationSample(
                f"{question_id:012d}",
                find_image(folder, f"Question {question_id}", f"COCO_{subtype}_{number}.jpg", f"{number}.jpg"),
                references=read_texts(annotation, "answers", "answer", where_answered),
                question=read_field(asked, "question", str, where),
                meta={"kind": read_kind(annotation, "answer_type", where_answered)},
            )
        )
    return samples
