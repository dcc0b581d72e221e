"""Questions as VQAv2 and OK-VQA have them, in two files: https://visualqa.org/vqa_v2_teaser.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ValueError: A question has no answers, or an image is missing in `folder`.
    """
    answers = {annotation["question_id"]: annotation for annotation in annotations.get("annotations", [])}
    subtype = content.get("data_subtype", "val2014")
    samples = []
    for asked in content["questions"][:num_samples]:
        if asked["question_id"] not in answers:
            raise ValueError(f"Question {asked['question_id']} has no answers; are --annotations of the same split?")
        annotation = answers[asked["question_id"]]
        number = f"{asked['image_id']:012d}"
        samples.append(
            EvaluationSample(
                f"{asked['question_id']:012d}",
                find_image(
                    folder,
                    f"Question {asked['question_id']}",
                    f"COCO_{subtype}_{number}.jpg",
                    f"{number}.jpg",
                ),
                references=tuple(answer["answer"] for answer in annotation["answers"]),
                question=asked["question"],
                meta={"kind": annotation.get("answer_type", "other")},
            )
        )
    return samples
