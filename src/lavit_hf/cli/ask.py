"""`lavit ask`."""

from __future__ import annotations

from typing import Any

from .generation import answer_question
from .loading import load
from .pictures import open_image


def run(source: str, question: str, model: str, *, device: str, dtype: str, options: dict[str, Any]) -> None:
    """Prints the answer."""
    image = open_image(source)
    print(answer_question(load(model, device, dtype), image, question.strip(), options))
