"""LaVIT's image processor, torchvision backend: in a file of its own, as transformers has one for each backend."""

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, ImageInput
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import requires_backends

from .image_processing_pil_lavit import LavitImageDefaults, prepare_array


class LavitImageProcessor(LavitImageDefaults, TorchvisionBackend):
    """Converts to RGB, squashes (no crop) to a fixed size, scales to [0, 1] and normalizes with CLIP's statistics.

    Takes PIL images, NumPy arrays, tensors, paths, URLs and file contents, alone or in (nested) lists. It needs
    torchvision, whose antialiased resizing differs from PIL's in the last bit; the published model used PIL's, so
    `LavitImageProcessorPil` is the exact one.
    """

    def __init__(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "torch.device | None" = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns one image as a checked tensor [C, H, W]."""
        if device is None and isinstance(image, torch.Tensor):
            device = image.device
        array = prepare_array(image, do_convert_rgb, input_data_format, kwargs.get("do_rescale"))
        tensor = torch.from_numpy(array.copy())
        tensor = super().process_image(
            tensor, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, device=device, **kwargs
        )
        size = kwargs.get("size")
        if kwargs.get("do_resize") and size is not None and size.height and size.width:
            # Not with the rest of the batch later, of which full-size arrays would wait here.
            tensor = self.resize(tensor, size, kwargs.get("resample"))
        return tensor


__all__ = ["LavitImageProcessor"]
