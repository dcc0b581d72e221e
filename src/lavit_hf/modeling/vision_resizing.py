"""A pretrained vision encoder for images of another size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_lavit import _as_pair
from .modeling_lavit_visual_tokenizer import without_pooler


def resize_vision_model(model: PreTrainedModel, image_size: int | tuple[int, int]) -> PreTrainedModel:
    """Returns the encoder for images of another size; its learned positions are interpolated as a picture is resized.

    Encoders with rotary positions have nothing to interpolate.

    Args:
        model: A plain vision transformer with one learned position per patch, after those of class and register
            tokens if these have any.
        image_size: Height and width of the images, in pixels.

    Raises:
        ValueError: If a weight other than a table of positions depends on the image size.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    if _grid(config) == _grid(model.config):
        return model
    arguments: dict[str, Any] = without_pooler(config)
    with torch.device("meta"), init.no_init_weights():
        resized = type(model)(config, **arguments)
    weights = model.state_dict()
    for name, expected in resized.state_dict().items():
        if expected.shape != weights[name].shape:
            weights[name] = _interpolate(name, weights[name], _grid(model.config), config)
            if expected.shape != weights[name].shape:
                raise ValueError(f"{name} of {type(model).__name__} cannot be interpolated to {image_size} pixels.")
    resized.load_state_dict(weights, strict=False, assign=True)
    return resized.eval()


def _grid(config: Any) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = _as_pair(config.image_size), _as_pair(config.patch_size)
    return height // patch_height, width // patch_width


def _interpolate(name: str, table: torch.Tensor, old: tuple[int, int], config: Any) -> torch.Tensor:
    """`[..., extra + old patches, width]` -> `[..., extra + new patches, width]`."""
    num_extra = table.shape[-2] - old[0] * old[1] if table.ndim >= 2 else -1
    if "position" not in name or num_extra < 0:
        raise ValueError(f"{name} depends on the image size, and is no table of positions that could be interpolated.")
    rows = table.reshape(-1, table.shape[-1])
    picture = rows[num_extra:].float().unflatten(0, old).movedim(-1, 0)[None]
    antialias = config.model_type == "dinov2_with_registers"  # as this one, alone, does by itself
    picture = F.interpolate(picture, _grid(config), mode="bicubic", align_corners=False, antialias=antialias)
    patches = picture[0].movedim(0, -1).flatten(0, 1).to(table.dtype)
    return torch.cat([rows[:num_extra], patches]).reshape(*table.shape[:-2], -1, table.shape[-1])
