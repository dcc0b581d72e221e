"""How many tokens images become, and where in them these are spent: budgets and regions of a processor's call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..modeling.modeling_lavit_visual_tokenizer import resolve_budget
from .image_processing_pil_lavit import flatten, read_size

BUDGETS = ("num_image_tokens", "keep_rate", "max_total_image_tokens")
_WEIGHT = 10.0


def assign_budgets(given: Mapping[str, Any], counts: Sequence[int], num_patches: int) -> list[int] | None:
    """How many tokens every image becomes.

    Args:
        given: The arguments of a call that say so; at most one is not `None`.
        counts: Images per prompt.
        num_patches: Patches of an image.

    Returns:
        One number per image; `None` if nothing is said.

    Raises:
        ValueError: If two arguments say something, or an image cannot become so many tokens.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        return None
    if len(named) > 1:
        raise ValueError(
            f"Give one of {', '.join(f'`{name}`' for name in named)}: each says how many tokens there are."
        )
    if (total := named.get("max_total_image_tokens")) is not None:
        if not isinstance(total, (int, np.integer)) or isinstance(total, bool):
            raise ValueError(f"`max_total_image_tokens` must be an integer; got {total!r}.")
        total = int(total)
        budgets = []
        for index, count in enumerate(counts):
            if count > total:
                raise ValueError(
                    f"Prompt {index} has {count} images, which need a token each; `max_total_image_tokens` is {total}."
                )
            shares = [total // count + (position < total % count) for position in range(count)]
            budgets += [min(share, num_patches) for share in shares]
        return budgets
    numbers = named.get("num_image_tokens")
    if isinstance(numbers, (list, tuple)):
        numbers = flatten(numbers)
        if not numbers and not sum(counts):
            return []
    return resolve_budget(numbers, named.get("keep_rate"), sum(counts), num_patches).tolist()


def assign_log_prior(
    images: Sequence[Any], regions: Any, weight: float | None, size: Any, num_patches: int
) -> torch.Tensor | None:
    """What regions add to the selector's log-odds.

    Args:
        images: The images of a call, in order.
        regions: Their regions, see [`region_log_prior`]: one for each, in a list; or that of the only image.
        weight: See [`region_log_prior`]; 10 by default.
        size: Height and width that images are resized to.
        num_patches: Patches of an image.

    Returns:
        `[images, num_patches]`; `None` without regions.

    Raises:
        ValueError: If there is a weight without regions, or not one region for each image.
    """
    if regions is None:
        if weight is not None:
            raise ValueError("`region_weight` says how much `regions` count; pass both.")
        return None
    rows = round((num_patches * size.height / size.width) ** 0.5)
    grid, weight = (rows, num_patches // rows), _WEIGHT if weight is None else weight
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"Regions need square patches: {num_patches} of {size.height} x {size.width} pixels are not.")
    # Of an image without a region the size does not matter; to read it, an address would be fetched once more.
    priors = [
        region_log_prior(region, (1, 1) if region is None else read_size(image), grid, weight)
        for image, region in zip(images, _assign_regions(regions, len(images)), strict=True)
    ]
    return torch.stack(priors) if priors else None


def _assign_regions(regions: Any, num_images: int) -> list[Any]:
    """The region of every image.

    Args:
        regions: One for each image, in a list; or that of the only image.
        num_images: Images of the call.

    Raises:
        ValueError: If there are not as many as images.
    """
    is_list = isinstance(regions, Sequence) and not (regions and isinstance(regions[0], (int, float, np.number)))
    if not is_list:
        regions = [regions]
    if len(regions) != num_images:
        raise ValueError(
            f"Got {len(regions)} regions for {num_images} images; pass one per image, `None` for no region."
        )
    return list(regions)


def region_log_prior(region: Any, image_size: tuple[int, int], grid: tuple[int, int], weight: float) -> torch.Tensor:
    """What to add to the selector's log-odds, so that patches in a region are likelier to become tokens.

    Images are squashed to the encoder's size, so that the grid of patches covers the whole image whatever its shape.

    Args:
        region: `None`; a box `(left, top, right, bottom)` in pixels of the image, or a list of boxes; or a mask
            `[height, width]` of the image, boolean or from 0 to 1.
        image_size: Height and width of the image as it was passed, in pixels.
        grid: Rows and columns of patches.
        weight: How many times as likely keeping a patch becomes, compared with dropping it, if the region covers it;
            a part of that where it covers a part.

    Returns:
        `[num_patches]`, in raster order.

    Raises:
        ValueError: If the region is something else, or not in the image, or the weight is not positive.
    """
    if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"`region_weight` must be a positive number; got {weight!r}.")
    if region is None:
        return torch.zeros(grid[0] * grid[1])
    is_mask = isinstance(region, (np.ndarray, torch.Tensor)) and tuple(region.shape) == image_size
    coverage = _cover_by_mask(region, grid) if is_mask else _cover_by_boxes(region, image_size, grid)
    return coverage.flatten() * math.log(weight)


def _cover_by_mask(mask: Any, grid: tuple[int, int]) -> torch.Tensor:
    values = torch.as_tensor(np.asarray(mask)).float()
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("A mask of a region must be boolean, or hold values from 0 to 1.")
    return F.adaptive_avg_pool2d(values[None, None], grid)[0, 0]


def _cover_by_boxes(region: Any, image_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    height, width = image_size
    try:
        boxes = np.atleast_2d(np.asarray(region, dtype=np.float64))
    except (TypeError, ValueError):
        boxes = np.empty(0)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            "A region must be a box (left, top, right, bottom), a list of boxes, or a mask of the image's size, "
            f"{height} x {width}; got {region!r:.80}."
        )
    coverage = torch.zeros(grid)
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"The box ({left:g}, {top:g}, {right:g}, {bottom:g}) is not in the image, which is {width} pixels "
                f"wide and {height} high. Boxes are (left, top, right, bottom)."
            )
        rows = _overlap(top / height * grid[0], bottom / height * grid[0], grid[0])
        columns = _overlap(left / width * grid[1], right / width * grid[1], grid[1])
        coverage = torch.maximum(coverage, rows[:, None] * columns)
    return coverage


def _overlap(start: float, end: float, count: int) -> torch.Tensor:
    """Which share of each of `count` unit intervals lies between two places, `[count]`."""
    places = torch.arange(count)
    return ((places + 1).clamp(max=end) - places.clamp(min=start)).clamp(min=0).float()


__all__ = ["BUDGETS", "assign_budgets", "assign_log_prior", "region_log_prior"]
