"""How many tokens images become, and which codes are in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.scenes import Scene, object_coverage
from .measurement import Measurement, measure_correlation, measure_mean

BRANCHES = ("discrete", "continuous")


@torch.no_grad()
def tokenize(model: Any, processor: Any, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Tokenizes images by both branches.

    Args:
        model: A `LavitForConditionalGeneration`.
        processor: Its processor.
        images: Any number.

    Returns:
        For each image its `codes`, and how many tokens it has in either branch, `num_tokens`.
    """
    visual_tokenizer = model.visual_tokenizer
    pixel_values = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(visual_tokenizer.device, visual_tokenizer.dtype)
    discrete, continuous = visual_tokenizer.encode(pixel_values), visual_tokenizer.embed(pixel_values)
    codes = discrete.codes.split(discrete.num_tokens.tolist())
    return [
        {"codes": of_image.tolist(), "num_tokens": {"discrete": len(of_image), "continuous": count}}
        for of_image, count in zip(codes, continuous.num_tokens.tolist(), strict=True)
    ]


def measure_tokens(records: Sequence[Mapping[str, Any]], codebook_size: int) -> dict[str, Measurement]:
    """Measures what [`tokenize`] has found.

    Args:
        records: With what it gave, and with `meta["scene"]` where scenes are evaluated.
        codebook_size: How many codes there are.

    Returns:
        Per branch mean and standard deviation of the number of tokens, and how that is correlated with the area of
        the objects in a scene; and the share of codes that occur, which is no estimate: more images use more codes.
    """
    found: dict[str, Measurement] = {}
    scenes = [record["meta"]["scene"] for record in records if "scene" in record["meta"]]
    areas = [object_area(Scene.from_dict(scene)) for scene in scenes]
    for branch in BRANCHES:
        counts = [record["num_tokens"][branch] for record in records]
        found[f"tokens/{branch}/mean"] = measure_mean(counts, "images")
        found[f"tokens/{branch}/std"] = Measurement(float(np.std(counts)), len(counts), "images")
        if areas:
            found[f"tokens/{branch}/r_with_object_area"] = measure_correlation(counts, areas, "images")
    used = {code for record in records for code in record["codes"]}
    found["live_codes"] = Measurement(len(used) / codebook_size, codebook_size, "codes", is_share=True)
    return found


def object_area(scene: Scene) -> float:
    """How many pixels of 64 x 64 the objects of a scene cover."""
    return float(object_coverage(scene).sum())


__all__ = ["measure_tokens", "object_area", "tokenize"]
