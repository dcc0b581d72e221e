"""LaVIT's image processor, PIL backend: complete without torchvision."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, ImageInput
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_conversion import prepare_array
from .image_structure import LavitImageDefaults


class LavitImageProcessorPil(LavitImageDefaults, PilBackend):
    """Converts to RGB, squashes (no crop) to a fixed size, scales to [0, 1] and normalizes with CLIP's statistics.

    Takes PIL images, NumPy arrays, tensors, paths, URLs and file contents, alone or in (nested) lists.
    """

    def __init__(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns one image as a checked array [C, H, W]."""
        size, resample = kwargs.get("size"), kwargs.get("resample")
        is_fixed = kwargs.get("do_resize") and isinstance(resample, int) and size is not None
        resized = (size.width, size.height) if is_fixed and size.height and size.width else None
        array = prepare_array(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"), resized, resample)
        return super().process_image(array, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs)


__all__ = ["LavitImageProcessorPil"]
