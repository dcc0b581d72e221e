"""What metrics of images share: reading them, the device, and how well they fit texts by CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from ...processing.image_processing_pil_lavit import load_image


def open_image(stored: dict[str, Any]) -> Image.Image:
    """Opens an image that evaluate has stored, in RGB.

    Args:
        stored: `bytes` of a file, or the `path` of one; what `datasets.Image(decode=False)` makes of paths and images.

    Raises:
        ValueError: The file is missing, no image, or too large to be decoded safely.
    """
    content = stored["bytes"]
    with load_image(Path(stored["path"]) if content is None else content) as image:
        return image.convert("RGB")


def choose_device(device: str | None) -> torch.device:
    """Returns the device asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class ClipSimilarity:
    """Cosines of image and text embeddings.

    Args:
        model_name_or_path: A CLIP checkpoint: a directory, or a name on the Hub like `openai/clip-vit-base-patch32`.
        device: Where it runs; a GPU if there is one, by default.
        batch_size: Pairs compared together.

    Raises:
        OSError: There is no such checkpoint.
    """

    def __init__(self, model_name_or_path: str | Path, device: str | None = None, batch_size: int = 32) -> None:
        self.device = choose_device(device)
        self.batch_size = batch_size
        # Whatever the checkpoint's precision is: half is slow on CPUs, and too coarse to tell similar drawings apart.
        self.model = CLIPModel.from_pretrained(model_name_or_path, dtype=torch.float32).eval().to(self.device)
        self.processor = CLIPProcessor.from_pretrained(model_name_or_path)

    def compare(self, images: Iterable[Image.Image], texts: Sequence[str]) -> list[float]:
        """Compares each image with its text.

        Args:
            images: RGB images; may be an iterator, of which only a batch is in memory.
            texts: As many texts. Longer ones than CLIP reads (77 tokens) are cut.

        Returns:
            A cosine per pair.

        Raises:
            ValueError: There are not as many images as texts.
        """
        remaining = iter(images)
        cosines: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            text_batch = list(texts[start : start + self.batch_size])
            image_batch = list(islice(remaining, len(text_batch)))
            if len(image_batch) < len(text_batch):
                raise ValueError(f"There are fewer images than the {len(texts)} texts.")
            cosines.extend(self._compare_batch(image_batch, text_batch))
        if next(remaining, None) is not None:
            raise ValueError(f"There are more images than the {len(texts)} texts.")
        return cosines

    def choose_best(self, images: Sequence[Image.Image], text: str) -> int:
        """Returns the index of the image that fits a text best, as the published COCO FID picks 1 of 4 drawings.

        Args:
            images: Drawings of the same prompt.
            text: The prompt.

        Returns:
            The index; the first one of equals.
        """
        cosines = self.compare(images, [text] * len(images))
        return cosines.index(max(cosines))

    @torch.inference_mode()
    def _compare_batch(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        inputs = self.processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt")
        output = self.model(**inputs.to(self.device))
        return (output.image_embeds * output.text_embeds).sum(dim=-1).tolist()  # both are normalized


__all__ = ["ClipSimilarity", "choose_device", "open_image"]
