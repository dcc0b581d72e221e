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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps

from ..utils.atomic_files import check_resumable, complete_file, remove_partials, write_json
from ..utils.contact_sheet import Panel, contact_sheet
from ..utils.json_files import read_json_object
from ..utils.public_text import one_line
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
        found = read_json_object(self._settings) if self._settings.exists() else None
        check_resumable(self.path, "predictions", settings, found)
        if found is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, settings)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Reads the records that are finished, by sample id.

        Raises:
            ValueError: A line is no record.
        """
        # Both, where a line was lost from the merged file and made again.
        files = [*([self._merged] if self._merged.exists() else []), *sorted(self._shards.glob("*.jsonl"))]
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
            with complete_file(self._pictures / name, tidies=False) as file:  # `merge` does that
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
_MARGIN, _FRAME = 8, 2
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
    columns = max(_COLUMNS // max((len(one.pictures) for one in shown), default=1), 1)
    panels = [Panel(_title(one), _framed(one)) for one in shown]
    return contact_sheet([panels[start : start + columns] for start in range(0, len(panels), columns)], title)


def _title(one: Shown) -> str:
    titles = [" | ".join(name for name, _ in one.pictures)] if len(one.pictures) > 1 else []
    return "\n".join([*titles, *(f"{name}: {text}" for name, text in one.lines)])


def _framed(one: Shown) -> Image.Image:
    """The pictures of a sample beside each other, in a frame that says whether it is right."""
    row = Image.new("RGB", (max(len(one.pictures), 1) * (_SIDE + _MARGIN) - _MARGIN, _SIDE), "white")
    for number, (_, picture) in enumerate(one.pictures):
        row.paste(picture, (number * (_SIDE + _MARGIN), 0))
    frame = {True: _RIGHT, False: _WRONG, None: _UNKNOWN}[one.is_right]
    return ImageOps.expand(ImageOps.expand(row, _FRAME, "white"), _FRAME, frame)


__all__ = ["PredictionDirectory", "PredictionWriter", "write_samples_page"]
