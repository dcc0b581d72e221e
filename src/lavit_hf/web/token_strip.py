"""The tokens of a picture as a strip of HTML: one can open each, by mouse or keyboard, and read what it is.

The strip holds the picture once, and the page each known picture once, as backgrounds: what differs between tokens is
where the background lies. So a slider can redraw hundreds of them while it moves.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from .studio import Look, Token

_SIDE = 192  # pixels of a background
_SHOWN = 4  # patches of other pictures for a token

CSS = """
#picture img, #overlay img, #drawing img, #again img { width: 100%; height: 100%; object-fit: contain;
  box-sizing: border-box; padding-top: 28px; }
.lavit-tokens { position: relative; display: flex; flex-wrap: wrap; gap: 4px; padding-bottom: 10.5rem; }
.lavit-tokens details { border: 1px solid var(--border-color-primary); border-radius: 4px; }
.lavit-tokens details[open] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.lavit-tokens summary { cursor: pointer; list-style: none; text-align: center; padding: 2px; }
.lavit-tokens summary { font: 11px var(--font-mono); }
.lavit-tokens summary::-webkit-details-marker { display: none; }
.lavit-tokens details > div { position: absolute; left: 0; right: 0; bottom: 0; min-height: 9rem; padding: 0.5rem; }
@media (max-width: 600px) {
  .lavit-tokens { padding-bottom: 15rem; }
  .lavit-tokens details > div { min-height: 13.5rem; }
}
.lavit-tokens details > div { border-top: 1px solid var(--border-color-primary); line-height: 1.5; }
.lavit-tokens p { margin: 0 0 0.4rem; }
.lavit-patch { display: block; width: 32px; height: 32px; margin: 0 auto; image-rendering: pixelated; }
.lavit-known { display: inline-block; position: relative; width: 72px; height: 72px; margin-right: 6px;
  background-size: 100% 100%; }
.lavit-known i { position: absolute; outline: 2px solid #e6007a; }
""".strip()


def known_style(pictures: Sequence[Image.Image]) -> str:
    """What the page needs once: the look of strips, and the known pictures."""
    rules = [f".lavit-known-{number} {{ background-image: {_url(one)} }}" for number, one in enumerate(pictures)]
    return "<style>" + "\n".join([CSS, *rules]) + "</style>"


def token_strip(image: Image.Image, look: Look, grid: tuple[int, int]) -> str:
    """The tokens of a picture.

    Args:
        image: The picture.
        look: What becomes of it.
        grid: Rows and columns of its patches.
    """
    rows, columns = grid
    style = (
        f".lavit-tokens .lavit-patch {{ background: {_url(image)}; background-size: {columns * 100}% {rows * 100}% }}"
    )
    tokens = "".join(_token(token, grid) for token in look.tokens)
    return f'<style>{style}</style><div class="lavit-tokens">{tokens}</div>'


def _token(token: Token, grid: tuple[int, int]) -> str:
    _, columns = grid
    row, column = divmod(token.patch, columns)
    left, top = (f"{100 * place / max(count - 1, 1):.4g}%" for place, count in ((column, columns), (row, grid[0])))
    facts = (
        f"Id <b>{token.index}</b>, code {token.code} of the visual vocabulary. Patch {token.patch}: row {row + 1}, "
        f"column {column + 1}. The selector is {token.keep_probability:.0%} sure to keep it."
    )
    shown = "".join(_known(number, patch, grid) for number, patch in token.known[:_SHOWN])
    others = f"The same code in example pictures:</p><div>{shown}</div>" if shown else "In no example picture.</p>"
    return (
        f'<details name="lavit-tokens"><summary><span class="lavit-patch" style="background-position:{left} {top}">'
        f"</span>{token.index}</summary><div><p>{facts}</p><p>{others}</div></details>"
    )


def _known(number: int, patch: int, grid: tuple[int, int]) -> str:
    rows, columns = grid
    row, column = divmod(patch, columns)
    frame = f"left:{100 * column / columns:.4g}%;top:{100 * row / rows:.4g}%"
    size = f"width:{100 / columns:.4g}%;height:{100 / rows:.4g}%"
    return f'<span class="lavit-known lavit-known-{number}"><i style="{frame};{size}"></i></span>'


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, format="PNG")
    return f"url(data:image/png;base64,{base64.b64encode(file.getvalue()).decode()})"


__all__ = ["known_style", "token_strip"]
