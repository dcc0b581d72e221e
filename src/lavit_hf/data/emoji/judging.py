"""A judge of pictures: reads what is on them by comparing them with all sprites. It knows no model.

The background is a plane through colors, found by trimming. What differs from it is compared with every sprite,
turned and flipped, at a low resolution; the best of these are then fitted to the picture (Lucas and Kanade, 1981), and
the one that leaves least is what is there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .pictures import IMAGE_SIZE, place_sprites
from .sprites import load_pack, scaled_sprites
from .world import BACKGROUNDS, PLACES, UNKNOWN, Scene, SceneObject

_HALF = IMAGE_SIZE // 2
# What differs from the background by so much in one channel, of 255, is something.
_CONTRAST = 26
# How far a background may be from the colors of the palette, which are 60 and more from each other.
_MAX_COLOR_ERROR = 45.0
# Share of a picture's pixels that are on its background.
_LEAST_BACKGROUND = 0.04
# Pixels of a quarter of the picture that are something; the smallest object has 120.
_LEAST_AREA = 45
# Pixels near the lines between quarters, which only big objects touch; stronger, as blur carries some there.
_LEAST_CROSSING, _CROSSING_CONTRAST = 10, 32
# Between the sides of small and of medium objects.
_MEDIUM_FROM = 32.5
# What a sprite must explain of an object's difference from the background, to be what is there.
_LEAST_EXPLAINED = 0.5
_ANGLES = (-8, 0, 8)
_SIDE = 40  # of sprites to compare with
_GRID = 12  # side of what is compared at first
_NUM_CANDIDATES, _NUM_FINALISTS = 16, 6


def judge(picture: Image.Image) -> Scene:
    """Reads a picture.

    Args:
        picture: Of any size; it is read at 96 x 96 pixels.

    Returns:
        What is on it, with `UNKNOWN` for what it cannot tell.
    """
    image = picture.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    background, plane = _find_background(pixels)
    difference = pixels - plane
    strength = difference.abs().amax(dim=0)
    is_something = _without_specks(strength > _CONTRAST)
    # What lies elsewhere is noise.
    difference = difference * F.max_pool2d(is_something[None].float(), 7, 1, 3)
    if _crossing(is_something & (strength > _CROSSING_CONTRAST)) >= _LEAST_CROSSING:
        found = [_read_big(difference, is_something, plane)]
    else:
        found = [
            _read_quarter(difference, is_something, plane, number)
            for number in range(4)
            if _quarter(is_something, number).sum() >= _LEAST_AREA
        ]
    return Scene(background, tuple(found))


def _find_background(pixels: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Returns the background's name, and its color at every pixel, `[3, side, side]`."""
    palette = torch.tensor(list(BACKGROUNDS.values())).float()
    edge = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    for lines in (slice(0, 3), slice(-3, None)):
        edge[lines] = edge[:, lines] = True
    # Gradients are lighter and darker shades: votes are for the nearest point between the two ends.
    light, dark = palette + 0.2 * (255 - palette), 0.85 * palette
    way = dark - light
    values = pixels[:, edge].T[:, None]  # [pixels, 1, 3]
    share = (((values - light) * way).sum(dim=-1) / way.square().sum(dim=-1)).clamp(0, 1)
    distance = (values - light - share[..., None] * way).norm(dim=-1)
    nearest, votes = distance.min(dim=1)
    winner = int(torch.bincount(votes[nearest < _MAX_COLOR_ERROR], minlength=len(palette)).argmax())
    # One pixel of four is enough to find a plane.
    all_values, at_edge = pixels[:, ::2, ::2].flatten(1).T, edge[::2, ::2].flatten()
    share = (((all_values - light[winner]) @ way[winner]) / way[winner].square().sum()).clamp(0, 1)
    is_its = (all_values - light[winner] - share[:, None] * way[winner]).norm(dim=-1) < _MAX_COLOR_ERROR
    if (is_its & at_edge).sum() > 60:
        is_its &= at_edge  # an object may have the background's color
    line = torch.linspace(-0.5, 0.5, IMAGE_SIZE)
    across, down = line.expand(IMAGE_SIZE, -1), line[:, None].expand(-1, IMAGE_SIZE)
    basis = torch.stack([torch.ones(IMAGE_SIZE, IMAGE_SIZE), across, down], dim=-1)
    some = basis[::2, ::2].flatten(0, 1)
    solution = torch.zeros(3, 3)
    solution[0] = pixels[:, edge].median(dim=1).values
    for tolerance in (40, 25, 16, 12):
        if is_its.sum() < 25:
            break
        chosen = some[is_its]
        solution = torch.linalg.solve(chosen.T @ chosen + 1e-3 * torch.eye(3), chosen.T @ all_values[is_its])
        is_its = (all_values - some @ solution).abs().amax(dim=1) < tolerance
    plane = (basis @ solution).permute(2, 0, 1)
    distance = (palette - solution[0]).norm(dim=-1)
    best = int(distance.argmin())
    is_known = distance[best] <= _MAX_COLOR_ERROR and is_its.float().mean() >= _LEAST_BACKGROUND
    name = list(BACKGROUNDS)[best] if is_known else UNKNOWN
    return name, plane


def _without_specks(mask: torch.Tensor) -> torch.Tensor:
    """Keeps what has two neighbors, as a thin line has."""
    around = F.avg_pool2d(mask[None, None].float(), 3, 1, 1, count_include_pad=False)[0, 0]
    return mask & (around > 0.3)


def _crossing(is_something: torch.Tensor) -> int:
    """Counts pixels on the lines between quarters, but for their ends, where a screenshot has lines of its own."""
    line, middle = slice(_HALF - 1, _HALF + 1), slice(16, -16)
    return int(is_something[line, middle].sum() + is_something[middle, line].sum())


def _quarter(values: torch.Tensor, number: int) -> torch.Tensor:
    row, column = divmod(number, 2)
    rows, columns = (slice(part * _HALF, (part + 1) * _HALF) for part in (row, column))
    return values[..., rows, columns]


def _read_quarter(
    difference: torch.Tensor, is_something: torch.Tensor, plane: torch.Tensor, number: int
) -> SceneObject:
    part = _quarter(difference, number)
    strength = part.abs().amax(dim=0)
    boxes = []
    # How much of an object's edge is seen depends on its colors, and on how sharp the picture is.
    for mask in (_quarter(is_something, number), strength > 2 * _CONTRAST):
        if mask.sum() >= _LEAST_AREA:
            x, y, side = _box_of(mask)
            boxes += [(x, y, side * factor) for factor in (0.9, 1.0, 1.12)]
    colors = _quarter(plane, number).mean(dim=(1, 2))
    fit = _fit(part, boxes, colors, (27.0, 38.0))
    row, column = divmod(number, 2)
    size = "medium" if fit.side >= _MEDIUM_FROM else "small"
    return _to_object(fit, size, PLACES[number], column * _HALF, row * _HALF, 1)


def _read_big(difference: torch.Tensor, is_something: torch.Tensor, plane: torch.Tensor) -> SceneObject:
    # At half the resolution.
    small = F.avg_pool2d(difference[None], 2)[0]
    left, right, top, bottom = _bounds(is_something)
    boxes = [((left + right) / 4, (top + bottom) / 4, max(right - left, bottom - top) / 2)]
    # Lines of a screenshot may belong to what was found.
    boxes += [(24 + x, 24 + y, side) for side in (33, 39, 45) for x in (-1.5, 1.5) for y in (-1.5, 1.5)]
    fit = _fit(small, boxes, plane.mean(dim=(1, 2)), (34.0, 44.0))
    return _to_object(fit, "big", "middle", 0, 0, 2)


def _bounds(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Returns where a mask begins and ends, across and down; single pixels do not count."""
    found: list[float] = []
    for axis in (0, 1):
        lines = torch.nonzero(mask.sum(dim=axis) >= 2)[:, 0]
        found += [float(lines[0]), float(lines[-1]) + 1] if len(lines) else [0.0, float(mask.shape[1 - axis])]
    return found[0], found[1], found[2], found[3]


class _Fit(NamedTuple):
    """The sprite that explains a part of a picture best, and how it lies there, in pixels of that part."""

    concept: int
    artist: int
    is_flipped: bool
    x: float
    y: float
    side: float
    angle: float
    explained: float


def _to_object(fit: _Fit, size: str, place: str, left: int, top: int, scale: int) -> SceneObject:
    pack = load_pack()
    concept = pack.concepts[fit.concept] if fit.explained >= _LEAST_EXPLAINED else UNKNOWN
    x, y = round(4 * (left + scale * fit.x)), round(4 * (top + scale * fit.y))
    side, angle = round(scale * fit.side), round(fit.angle)
    return SceneObject(concept, pack.artists[fit.artist], size, place, side, x, y, angle, fit.is_flipped)


class _Templates(NamedTuple):
    """What sprites look like, cut to their outlines, `[templates, ...]`.

    Attributes:
        values: Colors multiplied by alpha, and alpha, `[4 * _GRID ** 2, templates]`.
        color_energy: Sums of squares of colors, `[templates]`.
        cross: Sums of colors times alpha, `[templates, 3]`.
        alpha_energy: Sums of squares of alpha.
        sprite: Number of concept and artist.
        pose: Turned and flipped how: radians, and -1 or 1, `[templates, 2]`.
        box: Center across and down of the outline, from that of the sprite, and its side, in sides of the sprite.
    """

    values: torch.Tensor
    color_energy: torch.Tensor
    cross: torch.Tensor
    alpha_energy: torch.Tensor
    sprite: torch.Tensor
    pose: torch.Tensor
    box: torch.Tensor


@functools.cache
def _templates() -> _Templates:
    pack = load_pack()
    sprites = torch.from_numpy(np.argwhere(pack.is_drawn))
    poses = torch.tensor([(math.radians(angle), flip) for angle in _ANGLES for flip in (1.0, -1.0)])
    rows = []
    part, side = _HALF, _SIDE
    textures = scaled_sprites(side)
    for angle, flip in poses:
        for some in sprites.split(512):
            texture = textures[some[:, 0], some[:, 1]].float() / 255
            pose = torch.tensor([part / 2, part / 2, side / 2, angle, flip]).expand(len(some), -1)
            drawn = place_sprites(texture, pose, part)
            boxes = torch.tensor([_box_of(alpha > 0.2) for alpha in drawn[:, 3]])
            values = _cut(drawn, boxes)
            box = torch.cat([(boxes[:, :2] - part / 2) / side, boxes[:, 2:] / side], dim=-1)
            rows.append((values, some, torch.stack([angle, flip]).expand(len(some), -1), box))
    values, sprite, pose, box = (torch.cat(column) for column in zip(*rows, strict=True))
    color, alpha = values[:, :3].flatten(2), values[:, 3].flatten(1)
    return _Templates(
        values.flatten(1).T.contiguous(),
        color.square().sum(dim=(1, 2)),
        (color * alpha[:, None]).sum(dim=2),
        alpha.square().sum(dim=1),
        sprite,
        pose,
        box,
    )


def _box_of(mask: torch.Tensor) -> tuple[float, float, float]:
    left, right, top, bottom = _bounds(mask)
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top)


def _cut(values: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cuts squares (center across and down, side) out of pictures: `[squares, channels, _GRID, _GRID]`."""
    part = values.shape[-1]
    theta = torch.zeros(len(boxes), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = boxes[:, 2] / part
    theta[:, :, 2] = 2 * boxes[:, :2] / part - 1
    grid = F.affine_grid(theta, [len(boxes), 1, 2 * _GRID, 2 * _GRID], align_corners=False)
    cut = F.grid_sample(values.expand(len(boxes), -1, -1, -1), grid, mode="bilinear", align_corners=False)
    return F.avg_pool2d(cut, 2)


def _fit(
    difference: torch.Tensor,
    boxes: list[tuple[float, float, float]],
    color: torch.Tensor,
    sides: tuple[float, ...],
) -> _Fit:
    """Finds the sprite that explains a part of a picture best.

    Args:
        difference: From the background, `[3, part, part]`.
        boxes: Where the object may be: center across and down, and side.
        color: Of the background there.
        sides: Other sides to try than that of the best box.
    """
    templates, color = _templates(), color / 255
    target = difference / 255
    found = _cut(target[None], torch.tensor(boxes))  # [boxes, 3, grid, grid]
    behind = -(found * color[:, None, None]).sum(dim=1, keepdim=True)
    products = torch.cat([found, behind], dim=1).flatten(1) @ templates.values  # [boxes, templates]
    energy = templates.color_energy - 2 * templates.cross @ color + templates.alpha_energy * color.square().sum()
    own = found.square().sum(dim=(1, 2, 3))
    error = (own[:, None] - 2 * products + energy) / own.clamp_min(1e-6)[:, None]
    best, which = error.min(dim=0)
    # Of every sprite the best pose.
    number = templates.sprite[:, 0] * len(load_pack().artists) + templates.sprite[:, 1]
    chosen: list[int] = []
    seen: set[int] = set()
    for index in best.topk(_NUM_CANDIDATES * 4, largest=False).indices.tolist():
        if (key := int(number[index])) not in seen:
            seen.add(key)
            chosen.append(index)
        if len(chosen) == _NUM_CANDIDATES:
            break
    at = torch.tensor(chosen)
    box = torch.tensor(boxes)[which[at]]
    length = box[:, 2] / templates.box[at, 2]
    center = box[:, :2] - templates.box[at, :2] * length[:, None]
    poses = torch.cat([center, length[:, None] / 2, templates.pose[at]], dim=-1)
    sprite = templates.sprite[at]
    # All of them at half the resolution, then the best.
    to_half = torch.tensor([0.5, 0.5, 0.5, 1, 1])
    half, textures = F.avg_pool2d(target[None], 2)[0], _textures(_SIDE // 2, sprite)
    half_poses = poses * to_half
    for _ in range(2):
        half_poses = _improve(half, textures, half_poses, color)
    error = _errors(half, textures, half_poses, color)
    keep = error.topk(_NUM_FINALISTS, largest=False).indices
    poses, sprite = half_poses[keep] / to_half, sprite[keep]
    textures = _textures(_SIDE, sprite)
    for _ in range(2):
        poses = _improve(target, textures, poses, color)
    winner = int(_errors(target, textures, poses, color).argmin())
    # Once more, from other sizes: a thin end that is hardly visible makes an object seem smaller.
    tried = poses[winner].repeat(1 + len(sides), 1)
    tried[1:, 2] = torch.tensor(sides) / 2
    texture = textures[winner].expand(len(tried), -1, -1, -1)
    for _ in range(3):
        tried = _improve(target, texture, tried, color)
    error = _errors(target, texture, tried, color)
    best_of = int(error.argmin())
    explained = 1 - float(error[best_of] / target.square().sum().clamp_min(1e-6))
    x, y, half, angle, flip = tried[best_of].tolist()
    concept, artist = sprite[winner].tolist()
    return _Fit(concept, artist, flip < 0, x, y, 2 * half, math.degrees(angle), explained)


def _textures(side: int, sprite: torch.Tensor) -> torch.Tensor:
    return scaled_sprites(side)[sprite[:, 0], sprite[:, 1]].float() / 255


def _differences(
    target: torch.Tensor, textures: torch.Tensor, poses: torch.Tensor, color: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what sprites add to the background, and what is still to be explained, `[sprites, 3, part, part]`."""
    drawn = place_sprites(textures, poses, target.shape[-1])
    added = drawn[:, :3] - drawn[:, 3:] * color[:, None, None]
    return added, target - added


def _errors(target: torch.Tensor, textures: torch.Tensor, poses: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    return _differences(target, textures, poses, color)[1].square().sum(dim=(1, 2, 3))


def _improve(target: torch.Tensor, textures: torch.Tensor, poses: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """Makes a step of Gauss and Newton towards where a sprite fits best."""
    added, rest = _differences(target, textures, poses, color)
    part = target.shape[-1]
    padded = F.pad(added, (1, 1, 1, 1))
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    middles = torch.arange(part) + 0.5
    x = middles[None, None, None, :] - poses[:, 0, None, None, None]
    y = middles[None, None, :, None] - poses[:, 1, None, None, None]
    half = poses[:, 2, None, None, None]
    slopes = [-across, -down, -(across * x + down * y) / half, across * y - down * x]
    matrix = torch.stack([slope.flatten(1) for slope in slopes], dim=1)
    normal = matrix @ matrix.mT
    normal = normal + 1e-3 * torch.diag_embed(normal.diagonal(dim1=1, dim2=2)) + 1e-6 * torch.eye(4)
    step = torch.linalg.solve(normal, matrix @ rest.flatten(1)[..., None])[..., 0]
    limit = torch.tensor([3.0, 3.0, 3.0, 0.15])
    step = torch.minimum(torch.maximum(step, -limit), limit)
    better = torch.cat([poses[:, :4] + step, poses[:, 4:]], dim=-1)
    # As large and as much turned as objects are, so that nothing else is explained by a sprite that does not fit.
    better[:, 2].clamp_(part * 10 / 48, part * 26 / 48)
    better[:, 3].clamp_(-0.3, 0.3)
    return better
