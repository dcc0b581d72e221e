"""`lavit caption`."""

from __future__ import annotations

import sys
from typing import Any

from ..utils.progress import progress_bar
from .generation import caption_images
from .loading import load
from .pictures import open_images


def run(
    sources: list[str],
    model: str,
    *,
    prompt: str,
    batch_size: int,
    device: str,
    dtype: str,
    options: dict[str, Any],
) -> None:
    """Prints one caption per image, in order; every batch as soon as it is there.

    Raises:
        ValueError: In the end, if there were images that cannot be read.
    """
    lavit = load(model, device, dtype)
    bad: list[str] = []
    with progress_bar("Captioning", len(sources), len(sources) > batch_size, unit="image") as bar:
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            images, failures = open_images(batch)
            captions = caption_images(lavit, [image for _, image in images], prompt, options) if images else []
            for (source, _), caption in zip(images, captions, strict=True):
                line = caption if len(sources) == 1 else f"{source}\t{caption}"
                # Around the bar, if both go to a terminal.
                bar.write(line)
            bad += failures
            if len(sources) > 1:
                for failure in failures:
                    bar.write(f"lavit: left out: {failure}", file=sys.stderr)
            bar.update(len(batch))
    if bad:
        raise ValueError(f"{len(bad)} of {len(sources)} images could not be read." if len(sources) > 1 else bad[0])
