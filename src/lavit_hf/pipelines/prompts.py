"""Prompts of text and images, and the pictures to reconstruct, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from ..processing.image_processing_pil_lavit import check_images, flatten, prepare_array

_IMAGE_TYPES = (PIL.Image.Image, np.ndarray, torch.Tensor)


def split_prompts(prompt: Any, image_token: str) -> tuple[list[str], list[list[Any]]]:
    """Brings prompts to texts with placeholders, and the images of each.

    Args:
        prompt: A text; a list of texts and images, which is one prompt; or a list of prompts. A list of nothing but
            texts is a list of prompts.
        image_token: Placeholder to put where an image goes.

    Returns:
        Texts, and one list of images per text.

    Raises:
        TypeError: If something is neither text nor image.
        ValueError: If there is no prompt, or a text holds the placeholder.
    """
    is_one = isinstance(prompt, str) or (_is_list(prompt) and any(isinstance(part, _IMAGE_TYPES) for part in prompt))
    if isinstance(prompt, _IMAGE_TYPES):
        prompt, is_one = [prompt], True
    if not is_one and not _is_list(prompt):
        raise TypeError(
            f"`prompt` must be a text, a list of texts and PIL images, or a list of prompts; got {_name(prompt)}."
        )
    prompts = [prompt] if is_one else list(prompt)
    if not prompts:
        raise ValueError("`prompt` is empty: give at least one prompt (which may be an empty text).")
    parts = [[one] if isinstance(one, str) else one for one in prompts]
    texts = [_join(one, f"prompt[{index}]", image_token) for index, one in enumerate(parts)]
    return texts, [[part for part in one if not isinstance(part, str)] for one in parts]


def _join(parts: Any, name: str, image_token: str) -> str:
    if not _is_list(parts) or not parts:
        raise TypeError(f"`{name}` must be a text or a list of texts and PIL images; got {_name(parts)}.")
    for part in parts:
        if not isinstance(part, (str, *_IMAGE_TYPES)):
            raise TypeError(f"`{name}` must hold texts and PIL images; got {_name(part)}.")
        if isinstance(part, str) and image_token in part:
            raise ValueError(
                f"`{name}` holds the text {image_token!r}, which stands for an image; pass a list with the image in "
                "its place."
            )
    return "".join(part if isinstance(part, str) else image_token for part in parts)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _name(value: Any) -> str:
    return "an empty list" if _is_list(value) and not value else type(value).__name__


def release_pixel_values(images: Any, image_processor: Any) -> torch.Tensor:
    """Preprocesses pictures as the release does before it reconstructs them.

    There a tensor in [0, 1] is interpolated without antialiasing, which differs from what the image processor makes of
    a PIL image.

    Args:
        images: One picture or several: PIL images, arrays, tensors, paths or URLs. Floats are in [0, 1].
        image_processor: Its size, mean and standard deviation are used.

    Returns:
        `[images, 3, height, width]`.

    Raises:
        ValueError: If something is no picture.
    """
    size = (image_processor.size["height"], image_processor.size["width"])
    pictures = (_to_unit_range(image) for image in flatten(check_images(images)))
    resized = [F.interpolate(one[None], size, mode="bicubic", align_corners=False) for one in pictures]
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (torch.cat(resized) - mean) / std


def _to_unit_range(image: Any) -> torch.Tensor:
    """`[3, height, width]` in [0, 1]."""
    array = prepare_array(image, do_convert_rgb=True, input_data_format=None, do_rescale=False)
    if array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.float32) / 255)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"A picture of floats must be in [0, 1]; got a range of {array.min()} to {array.max()}.")
    return torch.from_numpy(array.astype(np.float32))


__all__ = ["release_pixel_values", "split_prompts"]
