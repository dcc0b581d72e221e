"""The sprites that come with the package."""

from pathlib import Path

import numpy as np
import torch
import yaml

from lavit_hf.data import emoji
from lavit_hf.data.emoji import load_pack
from lavit_hf.data.emoji.sprites import scaled_sprites
from lavit_hf.data.emoji.world import _extent

FOLDER = Path(emoji.__file__).parent / "sprites"
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "lavit_emoji"


def test_there_are_many_concepts_by_many_artists() -> None:
    pack = load_pack()
    assert len(pack.concepts) >= 150
    assert pack.sprites.shape == (len(pack.concepts), 8, 72, 72, 4)
    drawn_by = pack.is_drawn.sum(axis=1)
    assert drawn_by.min() >= 5 and drawn_by.mean() > 7
    assert pack.is_drawn[:, pack.artists.index("twemoji")].all()  # the unseen artist is tested on everything


def test_sprites_fill_their_squares() -> None:
    pack = load_pack()
    visible = pack.sprites[..., 3] > 12
    sides = np.maximum(_extent(visible.any(axis=2)), _extent(visible.any(axis=3)))
    assert (sides[pack.is_drawn] >= 70).all()
    assert not pack.sprites[pack.sprites[..., 3] == 0].any()


def test_scaled_sprites_are_multiplied_by_alpha() -> None:
    sprites = scaled_sprites(24)
    assert sprites.dtype == torch.uint8 and sprites.shape[2:] == (4, 24, 24)
    assert (sprites[:, :, :3] <= sprites[:, :, 3:]).all()
    is_drawn = torch.from_numpy(load_pack().is_drawn)
    assert torch.equal(sprites.flatten(2).any(dim=2), is_drawn)


def test_every_artist_is_named_with_a_license() -> None:
    notice = (FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for artist in load_pack().artists:
        assert f"| `{artist}.webp` |" in notice
    for name in ("Apache-2.0.txt", "MIT.txt", "CC-BY-4.0.txt"):
        assert f"licenses/{name}" in notice and (FOLDER / "licenses" / name).stat().st_size > 1000


def test_the_pack_is_what_the_example_makes() -> None:
    entries = yaml.safe_load((EXAMPLE / "concepts.yaml").read_text(encoding="utf-8"))
    pack = load_pack()
    assert {name: entry.get("noun", "one") for name, entry in entries.items()} == pack.nouns
    for name, entry in entries.items():
        for artist in pack.artists:
            if entry.get(artist, entry["icon"]) is None:
                assert not pack.is_drawn[pack.concepts.index(name), pack.artists.index(artist)]
