"""Questions as VizWiz has them: https://vizwiz.org/tasks-and-datasets/vqa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .image_files import find_image
from .sample import EvaluationSample


def is_vizwiz(content: Any) -> bool:
    """Whether this is `[{"image", "question", "answers": [{"answer"}]}]`."""
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return False
    answers = content[0].get("answers")
    return bool(answers) and isinstance(answers[0], dict) and {"image", "question"} <= set(content[0])


def read_vizwiz(content: list[Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """One sample per question, in the file's order.

    Raises:
        ValueError: An image is missing in `folder`.
    """
    return [
        EvaluationSample(
            Path(asked["image"]).stem,
            find_image(folder, f"Question {index}", asked["image"]),
            references=tuple(answer["answer"] for answer in asked["answers"]),
            question=asked["question"],
            meta={"kind": asked.get("answer_type", "other")},
        )
        for index, asked in enumerate(content[:num_samples])
    ]
