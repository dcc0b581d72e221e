"""Questions as VizWiz has them: https://vizwiz.org/tasks-and-datasets/vqa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import read_field, read_kind, read_texts
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
        ValueError: A field is missing or of another type, or an image is missing in `folder`.
    """
    samples = []
    for index, asked in enumerate(content[:num_samples]):
        where = f"Question {index}"
        image = read_field(asked, "image", str, where)
        samples.append(
            EvaluationSample(
                Path(image).stem,
                find_image(folder, where, image),
                references=read_texts(asked, "answers", "answer", where),
                question=read_field(asked, "question", str, where),
                meta={"kind": read_kind(asked, "answer_type", where)},
            )
        )
    return samples
