"""Makes the sprites of `lavit_hf.data.emoji` out of the artists' icons, as they are published on npm.

    for artist in noto noto-v1 fxemoji fluent-emoji fluent-emoji-flat emojione streamline-emojis twemoji; do
        npm pack @iconify-json/$artist
    done
    pip install resvg-py
    python examples/lavit_emoji/make_pack.py --packages . --output_dir src/lavit_hf/data/emoji/sprites

`concepts.yaml` says which. Each icon is drawn, cut to what is visible, and put into the middle of a square.
`--output_dir` gets a picture per artist with all concepts in rows, and `pack.json` with names.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import yaml
from PIL import Image

from lavit_hf.training import exit_on_write_errors

ARTISTS = (
    "noto",
    "noto-v1",
    "fxemoji",
    "fluent-emoji",
    "fluent-emoji-flat",
    "emojione",
    "streamline-emojis",
    "twemoji",
)
SIDE = 72  # of a sprite, in pixels
COLUMNS = 16  # sprites beside each other
_DRAWN = 216  # of an icon, before it is made smaller
_VISIBLE = 12  # least alpha of 255


def main(arguments: list[str] | None = None) -> None:
    """Makes the pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="where the .tgz files of npm are")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pack goes")
    args = parser.parse_args(arguments)
    text = Path(__file__).with_name("concepts.yaml").read_text(encoding="utf-8")
    concepts: dict[str, dict[str, Any]] = yaml.safe_load(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for artist in ARTISTS:
        icons = Icons(args.packages, artist)
        rows = -(-len(concepts) // COLUMNS)
        sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), dtype=np.uint8)
        missing = []
        for number, (name, entry) in enumerate(concepts.items()):
            body = icons.find(entry.get(artist, entry["icon"]))
            if body is None:
                missing.append(name)
                continue
            top, left = (place * SIDE for place in divmod(number, COLUMNS))
            sheet[top : top + SIDE, left : left + SIDE] = draw(body)
        Image.fromarray(sheet).save(args.output_dir / f"{artist}.webp", lossless=True, quality=100, method=4)
        print(f"{artist}: {len(concepts) - len(missing)} sprites; without {', '.join(missing) or 'none'}")
    nouns = {name: entry.get("noun", "one") for name, entry in concepts.items()}
    pack = {"artists": list(ARTISTS), "side": SIDE, "columns": COLUMNS, "concepts": nouns}
    (args.output_dir / "pack.json").write_text(json.dumps(pack, indent=1) + "\n", encoding="utf-8")


class Icons:
    """The icons of one artist."""

    def __init__(self, packages: Path, artist: str) -> None:
        found = sorted(packages.glob(f"iconify-json-{artist}-[0-9]*.tgz"))
        if len(found) != 1:
            raise SystemExit(
                f"{packages} has {len(found)} packages of {artist}; npm pack @iconify-json/{artist} gets one."
            )
        (path,) = found
        with tarfile.open(path) as archive:
            file = archive.extractfile("package/icons.json")
            assert file is not None
            content = json.load(file)
        self.size = (content.get("width", 16), content.get("height", 16))
        self.icons = {_plain(name): icon for name, icon in content["icons"].items()}
        for name, alias in content.get("aliases", {}).items():
            if parent := self.icons.get(_plain(alias["parent"])):
                self.icons.setdefault(_plain(name), {**parent, **alias})

    def find(self, name: str | None) -> str | None:
        """Returns an icon as an SVG; `None` if there is none."""
        icon = self.icons.get(_plain(name)) if name else None
        if icon is None:
            return None
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _plain(name: str) -> str:
    """Artists agree on names up to hyphens."""
    return name.replace("-", "")


def draw(svg: str) -> np.ndarray:
    """Draws an icon as large as a sprite, `[SIDE, SIDE, 4]`; what is not visible is black."""
    content = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_DRAWN))
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > _VISIBLE)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Colors are mixed by how visible they are.
    small = square.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
    sprite = np.array(small)
    sprite[sprite[..., 3] == 0] = 0
    return sprite


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
