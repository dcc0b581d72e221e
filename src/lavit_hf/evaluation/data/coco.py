"""Captions as COCO and NoCaps have them: https://cocodataset.org/#format-data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .fields import read_field
from .image_files import find_image
from .sample import EvaluationSample


def is_coco(content: Any) -> bool:
    """Whether this is `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`."""
    if not isinstance(content, dict) or not content.get("images") or not content.get("annotations"):
        return False
    return "caption" in content["annotations"][0]


def read_coco(content: dict[str, Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """One sample per image that has captions, in order of image ids.

    Raises:
        ValueError: A field is missing or of another type, or an image is missing in `folder`.
    """
    captions = defaultdict(list)
    for index, annotation in enumerate(content["annotations"]):
        where = f"annotations[{index}]"
        number = read_field(annotation, "image_id", int, where)
        captions[number].append(read_field(annotation, "caption", str, where))
    images = []
    for index, image in enumerate(content["images"]):
        where = f"images[{index}]"
        number = read_field(image, "id", int, where)
        if number in captions:
            images.append((number, read_field(image, "file_name", str, where)))
    return [
        EvaluationSample(
            f"{number:012d}", find_image(folder, f"Image {number}", name), references=tuple(captions[number])
        )
        for number, name in sorted(images)[:num_samples]
    ]
