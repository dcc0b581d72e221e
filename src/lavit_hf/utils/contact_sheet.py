"""Sheets of pictures with titles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_FONT_SIZE, _LINE = 13, 18
_HEADING_SIZE, _HEADING_LINE = 16, 32


class Panel(NamedTuple):
    """A picture with a title, which may have several lines."""

    title: str
    picture: Image.Image


def contact_sheet(rows: Sequence[Sequence[Panel]], heading: str = "") -> Image.Image:
    """Puts rows of pictures below each other, each picture with its title above it, wrapped to the picture's width."""
    font, heading_font = ImageFont.load_default(size=_FONT_SIZE), ImageFont.load_default(size=_HEADING_SIZE)
    titles = [[_wrap(panel.title, panel.picture.width, font) for panel in row] for row in rows]
    headers = [_LINE * max(len(lines) for lines in row) for row in titles]
    widths = [sum(panel.picture.width + _MARGIN for panel in row) for row in rows]
    heights = [
        header + max(panel.picture.height for panel in row) + 2 * _MARGIN
        for header, row in zip(headers, rows, strict=True)
    ]
    top = _MARGIN
    if heading:
        widths.append(round(heading_font.getlength(heading)) + _MARGIN)
        top += _HEADING_LINE
    sheet = Image.new("RGB", (max(widths) + _MARGIN, top + sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), heading, fill=(0, 0, 0), font=heading_font)
    for row, row_titles, header, height in zip(rows, titles, headers, heights, strict=True):
        left = _MARGIN
        for panel, lines in zip(row, row_titles, strict=True):
            draw.multiline_text((left, top), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=_LINE - _FONT_SIZE)
            sheet.paste(panel.picture, (left, top + header))
            left += panel.picture.width + _MARGIN
        top += height
    return sheet


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Lines no wider than so many pixels, unless a single word is."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
