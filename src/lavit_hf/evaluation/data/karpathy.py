"""Captions as Karpathy's splits of Flickr30k and COCO have them: https://cs.stanford.edu/people/karpathy/deepimagesent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ValueError: There is no such split, or an image is missing in `folder`.
    """
    images = [image for image in content["images"] if image["split"] == split]
    if not images:
        splits = sorted({image["split"] for image in content["images"]})
        raise ValueError(f"The file has no split {split!r}; it has {', '.join(splits)}.")
    return [
        EvaluationSample(
            f"{image['imgid']:012d}",
            find_image(folder, f"Image {image['imgid']}", *_names(image)),
            references=tuple(sentence["raw"] for sentence in image["sentences"]),
        )
        for image in images[:num_samples]
    ]


def _names(image: dict[str, Any]) -> list[str]:
    """Where the image may be; COCO's are also in folders of their own."""
    return [image["filename"], f"{image.get('filepath', '.')}/{image['filename']}"]
