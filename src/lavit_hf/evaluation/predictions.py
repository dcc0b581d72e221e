"""Predictions in a directory, while they are made and after, and a page of samples to look at.

```text
settings.json          what the predictions depend on
shards/00000.jsonl     what process 0 has finished, a line per sample; a torn last line is a sample not finished
pictures/ID.png        what was drawn; there before the sample's line is
predictions.jsonl      in the end: all lines, in the order of the data; the shards are gone
```
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageDraw, ImageFont

from ..data.public_text import one_line
from ..utils.atomic_files import complete_file, remove_partials, write_json
from ..utils.json_files import read_json_object
from .tasks import Shown

_PICTURES = "pictures"


class PredictionDirectory:
    """Predictions that are finished, and those that are not.

    Args:
        path: The directory; all processes and machines have to see the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path / "settings.json"
        self._shards = path / "shards"
        self._pictures = path / _PICTURES
        self._merged = path / "predictions.jsonl"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Creates the directory, or makes sure that what is there may be continued.

        Raises:
            ValueError: Something else is there, or was made with other settings.
        """
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they do in the file
        if not self._settings.exists():
            # A hidden file is what is left of the settings if this was killed here.
            if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
                raise ValueError(f"{self.path} exists and holds no predictions; choose another directory.")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, settings)
            return
        found = read_json_object(self._settings)
        names = sorted({name for name in {**found, **settings} if found.get(name) != settings.get(name)})
        if names:
            listed = "; ".join(f"{name}: {found.get(name)} there, {settings.get(name)} now" for name in names)
            raise ValueError(
                f"{self.path} was made from other data, of another checkpoint or with other options ({listed}). "
                "Choose another directory, or remove this one to start again."
            )

    def finished(self) -> dict[str, dict[str, Any]]:
        """Reads the records that are finished, by sample id.

        Raises:
            ValueError: A line is no record.
        """
        files = [self._merged] if self._merged.exists() else sorted(self._shards.glob("*.jsonl"))
        records = {}
        for file in files:
            for number, line in enumerate(_complete_lines(file), start=1):
                try:
                    record = json.loads(line)
                    records[record["id"]] = record
                except (ValueError, LookupError, TypeError) as error:
                    raise ValueError(
                        f"{file} is damaged in line {number}: it is no prediction. Remove the file, and run the same "
                        "command again."
                    ) from error
        return records

    @contextmanager
    def writer(self, process_index: int) -> Iterator[PredictionWriter]:
        """Opens the file to which a process appends what it has finished."""
        self._shards.mkdir(exist_ok=True)
        shard = self._shards / f"{process_index:05d}.jsonl"
        with open(shard, "ab+") as file:
            file.truncate(sum(map(len, _complete_lines(shard))))  # drops a line that was torn
            yield PredictionWriter(file, self._pictures)

    def merge(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Writes one file of all records, once all of them are finished.

        Args:
            ids: Those of all samples, in their order.

        Returns:
            The records.

        Raises:
            RuntimeError: One is missing, as if processes worked on different directories.
        """
        finished = self.finished()
        if missing := [sample_id for sample_id in ids if sample_id not in finished]:
            raise RuntimeError(
                f"{len(missing)} predictions are missing in {self.path}, the first is {missing[0]}. All processes "
                "have to write to the same directory; run the same command again to make what is missing."
            )
        records = [finished[sample_id] for sample_id in ids]
        with complete_file(self._merged) as file:
            file.writelines(map(_line, records))
        shutil.rmtree(self._shards, ignore_errors=True)
        remove_partials(self._pictures)
        return records


class PredictionWriter:
    """Appends records; each is there as a whole, or not at all.

    Args:
        file: The file to append to.
        pictures: Folder for what is drawn.
    """

    def __init__(self, file: BinaryIO, pictures: Path) -> None:
        self._file = file
        self._pictures = pictures

    def write(self, record: Mapping[str, Any], picture: Image.Image | None = None) -> None:
        """Writes a record, after its picture."""
        if picture is not None:
            self._pictures.mkdir(exist_ok=True)
            name = f"{record['id']}.png"
            with complete_file(self._pictures / name) as file:
                picture.save(file, format="PNG")
            record = {**record, "picture": f"{_PICTURES}/{name}"}
        self._file.write(_line(record))

    def flush(self) -> None:
        """Makes sure that what was written survives whatever happens next."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _complete_lines(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


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
        folder: The folder to write to.
        title: The heading of the page.
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
    """Scales a picture to the side that all have; the pixels of small ones stay visible."""
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


__all__ = ["PredictionDirectory", "PredictionWriter", "write_samples_page"]
