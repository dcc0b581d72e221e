"""What a pixel decoder takes: codes, ids and sizes, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

# The sizes (height, width) that the high-resolution decoder was published with.
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}
_PUBLISHED_SIZE = 1024


def resolve_size(
    height: int | None, width: int | None, aspect_ratio: str | None, native_size: int, multiple: int
) -> tuple[int, int]:
    """Returns the height and width to draw, in pixels.

    Args:
        height: Requested height; `native_size` by default.
        width: Requested width; `native_size` by default.
        aspect_ratio: A key of `ASPECT_RATIOS` instead of both. At a native size of 1024 it stands for the published
            size, at another one for the same shape with as many pixels as a native square.
        native_size: Side of the square that the U-Net was made for.
        multiple: What a side has to be a multiple of.

    Raises:
        ValueError: If the size is none, or no multiple.
    """
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise ValueError("Give either `aspect_ratio` or `height` and `width`, not both.")
        if aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"`aspect_ratio` must be one of {', '.join(ASPECT_RATIOS)}; got {aspect_ratio!r}.")
        published = ASPECT_RATIOS[aspect_ratio]
        height, width = (_nearest(side * native_size / _PUBLISHED_SIZE, multiple) for side in published)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (
            not isinstance(side, Integral) or isinstance(side, bool) or side < 1 or side % multiple
        ):
            raise ValueError(f"`{name}` must be a positive multiple of {multiple}; got {side!r}.")
    return int(height or native_size), int(width or native_size)


def _nearest(side: float, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple


def split_images(values: Any, name: str) -> list[torch.Tensor]:
    """Brings codes or ids to one 1-D tensor per image, on the CPU.

    Args:
        values: A sequence of 1-D integer tensors or lists of integers, one per image; a 2-D tensor; or, for one image,
            a 1-D tensor or a flat list.
        name: What to call the argument in errors.

    Returns:
        Tensors of dtype `torch.long`.

    Raises:
        TypeError: If something is no sequence of integers.
        ValueError: If there are no images.
    """
    if isinstance(values, torch.Tensor) and values.ndim == 2:
        values = list(values)
    elif isinstance(values, torch.Tensor) or (_is_sequence(values) and values and not any(map(_has_length, values))):
        values = [values]
    if not _is_sequence(values):
        raise TypeError(f"`{name}` must be a list of 1-D integer tensors, one per image; got {type(values).__name__}.")
    if len(values) == 0:
        raise ValueError(f"`{name}` is empty: give one tensor of codes per image.")
    return [_as_integers(image, f"{name}[{index}]") for index, image in enumerate(values)]


def _is_sequence(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def _has_length(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, torch.Tensor) else hasattr(value, "__len__")


def _as_integers(image: Any, name: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must hold integers; got {image!r:.80}.") from error
    if not isinstance(image, torch.Tensor) and tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers; got {tensor.dtype}.")
    if tensor.ndim != 1:
        raise TypeError(f"`{name}` must be 1-D; got the shape {list(tensor.shape)}.")
    return tensor.detach().cpu().long()


def codes_of_ids(
    input_ids: list[torch.Tensor], offset: int, codebook_size: int, eoi_token_id: int | None
) -> list[torch.Tensor]:
    """Takes the visual codes out of ids of the language model's vocabulary.

    Every id that is no code is dropped wherever it stands, as the original does: the prompt, image start and end,
    padding, and strays between codes.

    Args:
        input_ids: Ids of one image each, `[length]`.
        offset: Id of code 0.
        codebook_size: Number of codes.
        eoi_token_id: Id of image end. Codes that go on after it belong to another image, which is an error.

    Returns:
        Codes of every image.

    Raises:
        ValueError: If there are ids outside the vocabulary, or several images in a row.
    """
    return [
        _codes_of_row(ids, f"input_ids[{index}]", offset, codebook_size, eoi_token_id)
        for index, ids in enumerate(input_ids)
    ]


def _codes_of_row(
    ids: torch.Tensor, name: str, offset: int, codebook_size: int, eoi_token_id: int | None
) -> torch.Tensor:
    positions = ((ids >= offset) & (ids < offset + codebook_size)).nonzero()[:, 0]
    # After the last code come the placeholder of continuous features and tokens that users added. Both may stand in a
    # prompt, but not in an image: there, or without one, they tell of another vocabulary.
    inner = ids[positions[0] : positions[-1]] if len(positions) else ids
    outside = torch.cat([ids[ids < 0], inner[inner > offset + codebook_size]])
    if len(outside):
        raise ValueError(
            f"`{name}` holds the id {outside[0].item()}; ids go from 0 to {offset + codebook_size} in this vocabulary."
        )
    if len(positions) and eoi_token_id is not None:
        inner = ids[positions[0] : positions[-1]]
        if (inner == eoi_token_id).any():
            raise ValueError(
                f"`{name}` holds several images: codes go on after the image end ({eoi_token_id}). Pass one row per "
                "image, without the images of the prompt."
            )
    return ids[positions] - offset


def check_codes(codes: list[torch.Tensor], codebook_size: int, max_codes: int) -> None:
    """Refuses codes that the token decoder has no row or no position for."""
    for index, image in enumerate(codes):
        if len(image) > max_codes:
            raise ValueError(f"Image {index} has {len(image)} codes; an image has at most {max_codes}.")
        outside = image[(image < 0) | (image >= codebook_size)]
        if len(outside):
            raise ValueError(
                f"Image {index} has the code {outside[0].item()}; codes go from 0 to {codebook_size - 1}. (Ids of the "
                "language model's vocabulary are passed as `input_ids`.)"
            )


__all__ = ["ASPECT_RATIOS", "check_codes", "codes_of_ids", "resolve_size", "split_images"]
