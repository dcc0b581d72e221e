"""Captions as Karpathy's splits of Flickr30k and COCO have them: https://cs.stanford.edu/people/karpathy/deepimagesent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import read_field, read_texts
from .image_files import find_image
from .sample import EvaluationSample


def is_karpathy(content: Any) -> bool:
    """Whether this is `{"images": [{"imgid", "filename", "split", "sentences": [{"raw"}]}]}`."""
    return isinstance(content, dict) and bool(content.get("images")) and "sentences" in content["images"][0]


def read_karpathy(
    content: dict[str, Any], folder: Path, split: str, num_samples: int | None = None
) -> list[EvaluationSample]:
    """One sample per image of a split.

    Args:
        content: The file.
        folder: Where the images are; those of COCO also in folders of their own there, such as `val2014`.
        split: `"train"`, `"val"`, `"test"`, or whatever the file has.
        num_samples: How many at most.

    Raises:
        ValueError: There is no such split, a field is missing or of another type, or an image is missing in `folder`.
    """
    rows = [(f"images[{index}]", image) for index, image in enumerate(content["images"])]
    splits = [read_field(image, "split", str, where) for where, image in rows]
    if split not in splits:
        raise ValueError(f"The file has no split {split!r}; it has {', '.join(sorted(set(splits)))}.")
    chosen = [row for row, of in zip(rows, splits, strict=True) if of == split]
    return [_read_image(image, folder, where) for where, image in chosen[:num_samples]]


def _read_image(image: dict[str, Any], folder: Path, where: str) -> EvaluationSample:
    number, name = read_field(image, "imgid", int, where), read_field(image, "filename", str, where)
    return EvaluationSample(
        f"{number:012d}",
        # Those of COCO are also in folders of their own.
        find_image(folder, f"Image {number}", name, f"{image.get('filepath', '.')}/{name}"),
        references=read_texts(image, "sentences", "raw", where),
    )
