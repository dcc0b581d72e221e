"""What is evaluated on, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...training.dataset import read_images

_PROBES = 16


@dataclass(frozen=True)
class EvaluationSample:
    """One image, and what is known about it.

    Attributes:
        id: Unique in its data; also the name of files that are made of the sample.
        image: A path, or what `datasets` gives; read it by [`~EvaluationSample.open_image`].
        references: Right captions, or right answers to `question`.
        question: What is asked about the image, if something is.
        meta: What else scores depend on, such as the kind of the question; has to be JSON.
        image_root: Where a path of the image starts, which must not leave it; `None` if it is the caller's own.
    """

    id: str
    image: Any
    references: tuple[str, ...] = ()
    question: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    image_root: Path | None = None

    def open_image(self) -> Image.Image:
        """The image, upright and as RGB.

        Raises:
            ValueError: It is missing or corrupt, or not in its root.
        """
        try:
            (image,) = read_images(self.image, self.image_root)
        except ValueError as error:
            raise ValueError(f"Sample {self.id}: the image cannot be read ({error}).") from error
        return image


@dataclass(frozen=True)
class EvaluationData:
    """Samples in their fixed order.

    Attributes:
        name: As the user named them.
        split: Which part of them, if they have parts.
        samples: One after another; may be read only when asked for.
        caption_metrics: Which metrics score captions of them.
        answer_metric: Which metric scores answers.
        is_scenes: Whether a program can tell what is true about each image (`meta["scene"]`).
        is_benchmark: Whether it is asked with the settings of the paper, whatever the checkpoint's own are.
    """

    name: str
    split: str | None
    samples: Sequence[EvaluationSample]
    caption_metrics: tuple[str, ...] = ("cider", "bleu")
    answer_metric: str = "exact_match"
    is_scenes: bool = False
    is_benchmark: bool = False

    def digest(self) -> str:
        """Tells data apart: by all texts, and by some of the images."""
        digest = hashlib.sha256()
        step = max(len(self.samples) // _PROBES, 1)
        for index in range(len(self.samples)):
            sample = self.samples[index]
            texts = [sample.id, sample.question, list(sample.references), dict(sample.meta)]
            digest.update(json.dumps(texts, sort_keys=True).encode())
            if index % step == 0:
                image = sample.open_image()
                digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()


__all__ = ["EvaluationData", "EvaluationSample"]
