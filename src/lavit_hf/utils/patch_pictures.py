"""Pictures that show which patches became tokens."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

_GREY = (150, 150, 150)
_PATCH_BORDER = (120, 120, 120)
_GREYED = 0.8  # how much of a dropped patch is plain grey
_SMALLEST_SIDE = 200  # of a panel: smaller pictures are shown larger


def patch_grid(num_patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of images of this height and width."""
    height, width = image_size
    rows = round((num_patches * height / width) ** 0.5)
    return rows, num_patches // rows


def grey_out_dropped(image: Image.Image, keep_mask: torch.Tensor, grid: tuple[int, int]) -> Image.Image:
    """Greys the patches that became no token.

    Args:
        image: The picture, of any size: the model sees it squeezed into its grid of patches.
        keep_mask: True where a patch is kept, `[num_patches]`.
        grid: Rows and columns of the patches.

    Returns:
        A picture of the same size.
    """
    rows, columns = grid
    result = image.copy()
    greyed = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _GREY), _GREYED)
    draw = ImageDraw.Draw(result)
    for patch, kept in enumerate(keep_mask.tolist()):
        row, column = divmod(patch, columns)
        left, right = (round(edge * image.width / columns) for edge in (column, column + 1))
        top, bottom = (round(edge * image.height / rows) for edge in (row, row + 1))
        if not kept and left < right and top < bottom:
            result.paste(greyed.crop((left, top, right, bottom)), (left, top))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_PATCH_BORDER)
    return result


def fit_panel(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Enlarges small pictures so that their patches can be seen; or brings a picture to a given size."""
    if size is not None:
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, -(-_SMALLEST_SIDE // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
