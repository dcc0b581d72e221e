"""Pictures of scenes, many at a time and on any device, with labels of their patches."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .looks import Looks
from .sprites import load_pack, scaled_sprites
from .world import (
    BACKGROUNDS,
    BIG,
    MEDIUM,
    MIDDLE,
    SIZES,
    SMALL,
    UNITS,
    ArrayRng,
    Scene,
    SceneArrays,
)

IMAGE_SIZE = 96
MIN_IMAGE_SIZE = 32
NO_SIZE = len(SIZES)
# Sprites are scaled down before, so that none of their pixels are left out: to the largest side of each size.
_SIDES = {SMALL: 30, MEDIUM: 40, BIG: 72}
_PARTS = 256  # pictures rendered at a time on a CPU, where more of them would not stay in its caches
_VISIBLE = 0.2  # share of a patch that an object has to cover
# How a background becomes darker: from this share of white mixed in, to this share of black, of a gradient.
_LIGHT, _DARK = 0.2, 0.15


class PatchLabels(NamedTuple):
    """Labels of pictures' patches, in raster order, `[pictures, num_patches]` each.

    Attributes:
        concept: Place in `load_pack().concepts` of the object there, or their number where there is none.
        background: Place in `BACKGROUNDS` of the picture's background; -100, which losses ignore, where looks gave
            it other colors.
        size: Place in `SIZES`, or `NO_SIZE`.
        offset: From the middle of the patch to that of the object, across and down, in sides of the picture,
            `[pictures, num_patches, 2]`; 0 where there is none.
    """

    concept: torch.Tensor
    background: torch.Tensor
    size: torch.Tensor
    offset: torch.Tensor

    @property
    def is_object(self) -> torch.Tensor:
        """Where there is an object, `[pictures, num_patches]`."""
        return self.size != NO_SIZE


def render(scene: Scene, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        image_size: Width and height in pixels, an even number.

    Returns:
        An RGB picture.

    Raises:
        ValueError: The picture would be too small, or something in it is unknown.
    """
    pixels = render_scenes(SceneArrays.from_scenes([scene]), image_size)
    return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())


@torch.no_grad()
def render_scenes(
    scenes: SceneArrays, image_size: int = IMAGE_SIZE, device: str | torch.device = "cpu", looks: Looks | None = None
) -> torch.Tensor:
    """Draws many scenes.

    Args:
        scenes: What to draw.
        image_size: Width and height in pixels, an even number.
        device: Where to draw.
        looks: Other colors, proportions and outlines of objects, and other colors of backgrounds; by default none.

    Returns:
        Bytes, `[scenes, 3, image_size, image_size]`, on `device`.

    Raises:
        ValueError: The pictures would be too small.
    """
    check_image_size(image_size)
    parts = torch.empty(len(scenes), 3, image_size, image_size, dtype=torch.uint8, device=device)
    step = _PARTS if parts.device.type == "cpu" else max(len(scenes), 1)
    for start in range(0, len(scenes), step):
        rows = slice(start, start + step)
        some, its = _take(scenes, rows), None if looks is None else looks.take(rows)
        layer = _draw_objects(some, image_size, parts.device, its)
        canvas = _draw_backgrounds(some, image_size, parts.device, its)
        canvas.mul_(1 - layer[:, 3:]).add_(layer[:, :3])
        parts[rows] = canvas.clamp_(0, 255).round_().to(torch.uint8)
    return parts


@torch.no_grad()
def label_patches(
    scenes: SceneArrays, patches_per_side: int, device: str | torch.device = "cpu", looks: Looks | None = None
) -> PatchLabels:
    """Labels the patches of pictures.

    A patch shows an object if that covers 20 % of it.

    Args:
        scenes: What is on the pictures.
        patches_per_side: Their number, across and down.
        device: Where the labels are.
        looks: As for [`render_scenes`].

    Returns:
        Labels of all patches.
    """
    device = torch.device(device)
    size = max(MIN_IMAGE_SIZE, 4 * patches_per_side)
    size = -(-size // (2 * patches_per_side)) * 2 * patches_per_side
    cover = F.adaptive_avg_pool2d(_draw_objects(scenes, size, device, looks)[:, 3], patches_per_side)
    middles = (torch.arange(patches_per_side, device=device) + 0.5) / patches_per_side
    numbers = {name: _tensor(getattr(scenes, name), device) for name in ("concept", "size", "place", "x", "y")}
    # Objects do not share a quarter of the picture, so that the place of a patch tells which one it can show.
    half = (middles >= 0.5).long()
    quarter = (2 * half[:, None] + half).flatten()
    is_its = (numbers["place"][:, :, None] == quarter) | (numbers["place"] == MIDDLE)[:, :, None]
    is_its &= (numbers["concept"] >= 0)[:, :, None]
    owner = is_its.long().argmax(dim=1)  # [scenes, patches]
    is_object = (cover.flatten(1) > _VISIBLE) & is_its.any(dim=1)
    across = torch.stack([numbers[name].gather(1, owner) / (4 * UNITS) for name in ("x", "y")], dim=-1)
    grid = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), dim=-1).flatten(0, 1)
    background = _tensor(scenes.background, device)
    if looks is not None:
        background = background.masked_fill(_tensor(looks.is_repainted, device), -100)
    nothing = len(load_pack().concepts)
    return PatchLabels(
        torch.where(is_object, numbers["concept"].gather(1, owner), nothing),
        background[:, None].expand(-1, patches_per_side**2),
        torch.where(is_object, numbers["size"].gather(1, owner), NO_SIZE),
        (across - grid) * is_object[..., None],
    )


@torch.no_grad()
def object_area(scenes: SceneArrays) -> np.ndarray:
    """Computes which share of each picture its objects cover, `[scenes]`."""
    layer = _draw_objects(scenes, IMAGE_SIZE, torch.device("cpu"), None)
    return layer[:, 3].mean(dim=(1, 2)).numpy()


def check_image_size(image_size: int) -> None:
    """Raises `ValueError` if pictures cannot have this side."""
    if image_size < MIN_IMAGE_SIZE or image_size % 2:
        raise ValueError(f"image_size must be even, and at least {MIN_IMAGE_SIZE}, got {image_size}.")


def _take(scenes: SceneArrays, rows: slice) -> SceneArrays:
    return SceneArrays(**{name: array[rows] for name, array in vars(scenes).items()})


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _draw_objects(scenes: SceneArrays, image_size: int, device: torch.device, looks: Looks | None) -> torch.Tensor:
    """Draws all objects, `[scenes, 4, side, side]`: colors times alpha from 0 to 255, and alpha from 0 to 1."""
    layer = torch.zeros(len(scenes), 4, image_size, image_size, device=device)
    half = image_size // 2
    # Quarters of the pictures, [scenes, 4, row, half, column, half].
    quarters = layer.view(len(scenes), 4, 2, half, 2, half)
    for size in (SMALL, MEDIUM, BIG):
        row, column = np.nonzero((scenes.concept >= 0) & (scenes.size == size))
        if not len(row):
            continue
        drawn = _draw_sprites(scenes, row, column, size, image_size, device, looks)
        at = _tensor(row, device)
        if size == BIG:
            layer[at] = drawn
        else:
            place = _tensor(scenes.place[row, column], device)
            quarters[at, :, place // 2, :, place % 2] = drawn
    return layer


def _draw_sprites(
    scenes: SceneArrays,
    row: np.ndarray,
    column: np.ndarray,
    size: int,
    image_size: int,
    device: torch.device,
    looks: Looks | None,
) -> torch.Tensor:
    """Draws objects of one size, each into its quarter of the picture, or a big one into all of it."""
    scale = image_size / UNITS
    side = min(math.ceil(_SIDES[size] * scale), load_pack().sprites.shape[2])
    textures = _textures(side, device)
    texture = textures[_tensor(scenes.concept[row, column], device), _tensor(scenes.artist[row, column], device)]
    part = image_size if size == BIG else image_size // 2
    place = scenes.place[row, column]
    angle = np.deg2rad(scenes.angle[row, column] + (0.0 if looks is None else looks.angle[row, column]))
    stretch = np.ones((len(row), 2)) if looks is None else looks.stretch[row, column]
    half = scenes.side[row, column] / 2 * scale
    x, y = (
        at[row, column] / 4 * scale - np.where(place == MIDDLE, 0, number * (image_size // 2))
        for at, number in ((scenes.x, place % 2), (scenes.y, place // 2))
    )
    flip = np.where(scenes.is_flipped[row, column] == 1, -1.0, 1.0)
    pose = np.stack([x, y, half, angle, flip], axis=-1)
    drawn = place_sprites(texture.float(), torch.from_numpy(pose).to(device), part, _tensor(stretch, device))
    alpha = drawn[:, 3:].div_(255)
    if looks is not None:
        color = _vary(drawn[:, :3], alpha, looks, row, column)
        return torch.cat([color, alpha], dim=1)
    return drawn


def place_sprites(
    textures: torch.Tensor, poses: torch.Tensor, part: int, stretch: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Draws sprites into squares of `part` pixels.

    Args:
        textures: `[sprites, 4, side, side]`.
        poses: Center across and down, half the side, all in pixels, angle in radians, and -1 where left and right are
            exchanged, else 1: `[sprites, 5]`.
        part: Width and height of what is drawn.
        stretch: Factors of width and height, `[sprites, 2]`.

    Returns:
        `[sprites, 4, part, part]`, in the range of the textures.
    """
    x, y, half, angle, flip = poses.unbind(dim=-1)
    across, down = (stretch * torch.ones_like(poses[:, :2])).unbind(dim=-1)
    # From pixels of the part, which run from -1 to 1, to places in the sprite, which do as well.
    zoom = part / 2 / half
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack(
        [
            torch.stack([cosine * flip / across, sine * flip / across], dim=-1),
            torch.stack([-sine / down, cosine / down], dim=-1),
        ],
        dim=1,
    )
    center = torch.stack([2 * x / part - 1, 2 * y / part - 1], dim=-1)[..., None]
    theta = torch.cat([turn, -turn @ center], dim=-1).to(textures.dtype)
    grid = F.affine_grid(theta, [len(poses), 4, part, part], align_corners=False)
    return F.grid_sample(textures, grid, mode="bilinear", align_corners=False)


def _vary(color: torch.Tensor, alpha: torch.Tensor, looks: Looks, row: np.ndarray, column: np.ndarray) -> torch.Tensor:
    """Gives objects other colors, and some an outline."""
    device = color.device
    matrix = _tensor(looks.matrix[row, column].astype(np.float32), device)
    shift = _tensor(looks.shift[row, column].astype(np.float32), device)[:, None, None, None]
    color = torch.einsum("nij,njhw->nihw", matrix, color) + 255 * shift * alpha
    color = torch.minimum(color.clamp_min(0), 255 * alpha)
    is_outlined = _tensor(looks.is_outlined[row, column], device)[:, None, None, None]
    inner = -F.max_pool2d(-alpha, 3, 1, 1)
    return torch.where(is_outlined, color * (1 - 0.7 * (alpha - inner).clamp(0, 1)), color)


_ON_DEVICES: dict[tuple[int, torch.device], torch.Tensor] = {}


def _textures(side: int, device: torch.device) -> torch.Tensor:
    """Sprites on a device."""
    key = (side, device)
    if key not in _ON_DEVICES:
        _ON_DEVICES[key] = scaled_sprites(side).to(device)
    return _ON_DEVICES[key]


def _draw_backgrounds(scenes: SceneArrays, image_size: int, device: torch.device, looks: Looks | None) -> torch.Tensor:
    """Draws backgrounds, `[scenes, 3, image_size, image_size]`, from 0 to 255."""
    base = np.array(list(BACKGROUNDS.values()), dtype=np.float64)[scenes.background]
    is_graded = (scenes.gradient >= 0)[:, None]
    light = np.where(is_graded, base + _LIGHT * (255 - base), base)
    dark = np.where(is_graded, base * (1 - _DARK), base)
    if looks is not None:
        light = np.where(looks.is_repainted[:, None], looks.colors[:, 0], light)
        dark = np.where(looks.is_repainted[:, None], looks.colors[:, 1], dark)
    angle = np.deg2rad(np.maximum(scenes.gradient, 0))
    # Linear in the place, from the first color to the second, and as dark as the plain color in the middle.
    slope = (
        np.stack([np.cos(angle), np.sin(angle)], axis=-1) / (np.abs(np.cos(angle)) + np.abs(np.sin(angle)))[:, None]
    )
    values = [light, dark - light, slope]
    light_, way, slope_ = (_tensor(array.astype(np.float32), device) for array in values)
    middles = (torch.arange(image_size, device=device) + 0.5) / image_size - 0.5
    share = slope_[:, :1, None] * middles + slope_[:, 1:, None] * middles[:, None] + 0.5  # [scenes, down, across]
    canvas = light_[:, :, None, None] + way[:, :, None, None] * share[:, None]
    for row in np.flatnonzero(scenes.screenshot):
        _draw_screenshot(canvas[row], int(scenes.screenshot[row]), scenes, int(row))
    return canvas


def _draw_screenshot(canvas: torch.Tensor, layout: int, scenes: SceneArrays, row: int) -> None:
    """Draws a bar at an edge, and gray lines of text at the other, into a background, `[3, side, side]`."""
    unit = canvas.shape[-1] / UNITS
    rng = ArrayRng(scenes.concept[row, 0], scenes.x[row, 0], scenes.y[row, 0], scenes.side[row, 0], layout)
    bar = int(rng.between(4, 9))
    lines = [(int(rng.between(2, 20)), int(rng.between(30, 90))) for _ in range(2)]
    spans = [slice(0, round(bar * unit)), slice(round((UNITS - bar) * unit), None)]
    canvas[:, spans[layout - 1]] *= 0.82
    for number, (start, stop) in enumerate(lines):
        top = 3 + 5 * number
        top = UNITS - top - 2 if layout == 1 else top
        canvas[:, round(top * unit) : round((top + 2) * unit), round(start * unit) : round(stop * unit)] *= 0.6
