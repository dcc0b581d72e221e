"""Captions as COCO and NoCaps have them: https://cocodataset.org/#format-data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

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
        ValueError: An image is missing in `folder`.
    """
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    images = sorted((image for image in content["images"] if image["id"] in captions), key=lambda image: image["id"])
    return [
        EvaluationSample(
            f"{image['id']:012d}",
            find_image(folder, f"Image {image['id']}", image["file_name"]),
            references=tuple(captions[image["id"]]),
        )
        for image in images[:num_samples]
    ]
