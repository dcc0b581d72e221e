"""A page of samples that people can look at: as HTML, and as one picture."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..data.public_text import one_line
from ..utils.atomic_files import complete_file
from .tasks import Shown

_SIDE = 192  # pixels that pictures are shown at
_MARGIN = 8
_LINE = 16
_CHARACTERS = 30  # per line and picture
_COLUMNS = 6  # pictures beside each other
_WRONG, _RIGHT, _UNKNOWN = (200, 30, 30), (30, 130, 60), (120, 120, 120)
_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; }
main { display: flex; flex-wrap: wrap; gap: 1em; }
section { border: 2px solid #787878; border-radius: 4px; padding: 8px; max-width: 420px; }
section.right { border-color: #1e823c; }
section.wrong { border-color: #c81e1e; background: #fff4f4; }
figure { display: inline-block; margin: 0 8px 0 0; }
figcaption { color: #666; }
"""


def write_samples_page(folder: Path, title: str, shown: Sequence[Shown]) -> None:
    """Writes `samples.html`, which needs no other file, and `samples.png`.

    Args:
        folder: Where to.
        title: What is shown.
        shown: The samples, right or wrong: all that are given are on the page.
    """
    title = one_line(title)
    shown = [
        Shown(
            [(one_line(name), _fit(picture)) for name, picture in one.pictures],
            [(one_line(name), one_line(text)) for name, text in one.lines],
            one.is_right,
        )
        for one in shown
    ]
    with complete_file(folder / "samples.html") as file:
        file.write(_to_html(title, shown).encode())
    with complete_file(folder / "samples.png") as file:
        _to_picture(title, shown).save(file, format="PNG", optimize=True)


def _fit(picture: Image.Image) -> Image.Image:
    """Small pictures keep their pixels visible."""
    scale = _SIDE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _verdict(one: Shown) -> str:
    return {True: "right", False: "wrong", None: ""}[one.is_right]


def _to_html(title: str, shown: Sequence[Shown]) -> str:
    sections = []
    for one in shown:
        figures = "".join(
            f'<figure><img src="{_data_url(picture)}" alt=""><figcaption>{html.escape(name)}</figcaption></figure>'
            for name, picture in one.pictures
        )
        lines = "".join(f"<div><b>{html.escape(name)}</b> {html.escape(text)}</div>" for name, text in one.lines)
        sections.append(f'<section class="{_verdict(one)}">{figures}{lines}</section>')
    title = html.escape(title)
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
    body = "\n".join(sections)
    return f"{head}<style>{_STYLE}</style>\n<h1>{title}</h1>\n<main>\n{body}\n</main>\n</html>\n"


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _to_picture(title: str, shown: Sequence[Shown]) -> Image.Image:
    per_sample = max((len(one.pictures) for one in shown), default=1)
    columns = max(_COLUMNS // per_sample, 1)
    cell_width = per_sample * (_SIDE + _MARGIN) + _MARGIN
    texts = [_wrap(one, per_sample) for one in shown]
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [_SIDE + 2 * _MARGIN + _LINE * max(len(texts[index]) for index in row) for row in rows]
    header = 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, header + sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=ImageFont.load_default(size=16))
    font, top = ImageFont.load_default(size=12), header
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left, one = _MARGIN + column * cell_width, shown[index]
            color = {True: _RIGHT, False: _WRONG, None: _UNKNOWN}[one.is_right]
            draw.rectangle((left, top, left + cell_width - _MARGIN, top + height - _MARGIN), outline=color, width=2)
            for number, (_, picture) in enumerate(one.pictures):
                sheet.paste(picture, (left + 4 + number * (_SIDE + _MARGIN), top + 4))
            for number, line in enumerate(texts[index]):
                draw.text((left + 6, top + _SIDE + 6 + number * _LINE), line, fill="black", font=font)
        top += height
    return sheet


def _wrap(one: Shown, per_sample: int) -> list[str]:
    """The lines below a sample's pictures."""
    titles = " | ".join(name for name, _ in one.pictures)
    lines = [titles] if len(one.pictures) > 1 else []
    for name, text in one.lines:
        lines += textwrap.wrap(f"{name}: {text}", _CHARACTERS * per_sample) or [f"{name}:"]
    return lines


__all__ = ["write_samples_page"]
