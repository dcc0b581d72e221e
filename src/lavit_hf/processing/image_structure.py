"""How callers hand over images (one, a flat list, one list per prompt), and what both image backends share."""

import os
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from ..modeling.checkpoint_files import RemoteCodeDictMixin
from .image_conversion import load_image

_ACCEPTED = "a PIL image, a NumPy array, a tensor, a path, a URL or the bytes of an image file"


def fetch_images(images: Any) -> Any:
    """Opens every path, URL and file content in a single image or a (nested) list; keeps the nesting.

    Raises:
        ValueError: for `None`, an empty list, or anything that is no image.
    """
    images = check_images(images)
    if isinstance(images, list):
        return [fetch_images(image) if not _is_empty_list(image) else [] for image in images]
    return load_image(images) if isinstance(images, (str, bytes, os.PathLike)) else images


def check_images(images: Any) -> Any:
    """As `fetch_images`, but leaves files closed: they are opened one by one, when they are processed."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("Got an empty list of images; pass at least one image.")
        return [check_images(image) if not _is_empty_list(image) else [] for image in images]
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray, torch.Tensor)):
        return images
    raise ValueError(f"An image must be {_ACCEPTED}, got {type(images).__name__}.")


def _is_empty_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def is_nested(images: Any) -> bool:
    """Whether the images come as one list per prompt."""
    return isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)


def flatten(images: Any) -> list[Any]:
    """A single image, a batch array [B, C, H, W], or a list of these, as a flat list of single images."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in flatten(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


class LavitImageDefaults(RemoteCodeDictMixin):
    """What the two backends share: the release's preprocessing, and which inputs are taken."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, is_used in (
            ("rescale_factor", self.do_rescale),
            ("image_mean", self.do_normalize),
            ("image_std", self.do_normalize),
        ):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) and name != "rescale_factor" else [value]
            is_number = [isinstance(one, Real) and not isinstance(one, bool) and isfinite(one) for one in values]
            if is_used and not all(is_number):
                raise ValueError(f"{name} must be a number, or numbers per channel for mean and std; got {value!r}.")

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs and file contents; images pass through. The nesting is kept."""
        return fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        flat = flatten(check_images(images))  # opened in `process_image`, so that one at a time is in memory
        if not flat:
            raise ValueError("Got no images; pass at least one.")
        return flat
