"""The sprites: pictures of concepts as several artists drew them, cut out, from a picture per artist.

`sprites/NOTICE.md` names the artists and their licenses.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

_FOLDER = Path(__file__).resolve().parent / "sprites"


@dataclass(frozen=True)
class Pack:
    """What there is to draw.

    Attributes:
        concepts: Names, as captions use them. Labels of patches are places in this list.
        nouns: For each name how it is used: `"one"` (a dog), `"some"` (bread) or `"many"` (grapes).
        artists: Names of the artists.
        sprites: What artists drew of concepts, `[concepts, artists, side, side, 4]`: red, green, blue and alpha; black
            where nothing is visible.
    """

    concepts: tuple[str, ...]
    nouns: dict[str, str]
    artists: tuple[str, ...]
    sprites: np.ndarray

    @functools.cached_property
    def is_drawn(self) -> np.ndarray:
        """Which concepts each artist drew, `[concepts, artists]`."""
        return np.asarray(self.sprites[..., 3].any(axis=(2, 3)))

    @functools.cached_property
    def is_shared(self) -> np.ndarray:
        """Which concepts all artists drew, `[concepts]`: those of the smaller world."""
        return np.asarray(self.is_drawn.all(axis=1))


@functools.cache
def load_pack() -> Pack:
    """Reads the pack that comes with the package."""
    entry = json.loads((_FOLDER / "pack.json").read_text(encoding="utf-8"))
    side, columns, nouns = entry["side"], entry["columns"], entry["concepts"]
    sprites = np.empty((len(nouns), len(entry["artists"]), side, side, 4), dtype=np.uint8)
    for number, artist in enumerate(entry["artists"]):
        with Image.open(_FOLDER / f"{artist}.webp") as image:
            sheet = np.asarray(image.convert("RGBA"))
        cells = sheet.reshape(-1, side, columns, side, 4).swapaxes(1, 2).reshape(-1, side, side, 4)
        sprites[:, number] = cells[: len(nouns)]
    sprites[sprites[..., 3] == 0] = 0  # WebP stores any color there
    sprites.flags.writeable = False
    return Pack(tuple(nouns), nouns, tuple(entry["artists"]), sprites)


@functools.lru_cache(maxsize=8)
def scaled_sprites(side: int) -> torch.Tensor:
    """All sprites with another number of pixels, colors multiplied by alpha.

    Args:
        side: Width and height in pixels.

    Returns:
        Bytes, `[concepts, artists, 4, side, side]`.
    """
    sprites = load_pack().sprites
    result = np.zeros((*sprites.shape[:2], side, side, 4), dtype=np.uint8)
    for index in zip(*np.nonzero(load_pack().is_drawn), strict=True):
        # PIL's mode "RGBa" is multiplied by alpha; its arithmetic is of integers, the same everywhere.
        image = Image.fromarray(sprites[index]).convert("RGBa")
        result[index] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    # Bicubic scaling overshoots: a color must not be more than its alpha.
    np.minimum(result[..., :3], result[..., 3:], out=result[..., :3])
    return torch.from_numpy(np.ascontiguousarray(result.transpose(0, 1, 4, 2, 3)))
