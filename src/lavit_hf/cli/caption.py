"""`lavit caption`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm

from .generation import caption_images
from .loading import load
from .pictures import check_files, open_image


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
    """Prints one caption per image, in order; every batch as soon as it is there."""
    check_files(sources)
    lavit = load(model, device, dtype)
    with tqdm(total=len(sources), desc="Captioning", unit="image", disable=len(sources) <= batch_size) as bar:
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            captions = caption_images(lavit, [open_image(source) for source in batch], prompt, options)
            for source, caption in zip(batch, captions, strict=True):
                line = caption if len(sources) == 1 else f"{source}\t{caption}"
                # Around the bar, if both go to a terminal.
                bar.write(line)
            bar.update(len(batch))
