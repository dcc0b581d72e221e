r"""The directory that predictions are kept in while they are made, and after.

```text
settings.json          what the predictions depend on
shards/00000.jsonl     what process 0 has finished, a line per sample; a torn last line is a sample not finished
pictures/ID.png        what was drawn; there before the sample's line is
predictions.jsonl      in the end: all lines, in the order of the data; the shards are gone
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..utils.atomic_files import complete_file, remove_partials, write_json
from ..utils.json_files import read_json_object

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
        """The records that are there, by sample id."""
        files = [self._merged] if self._merged.exists() else sorted(self._shards.glob("*.jsonl"))
        records = (json.loads(line) for file in files for line in _complete_lines(file))
        return {record["id"]: record for record in records}

    @contextmanager
    def writer(self, process_index: int) -> Iterator[PredictionWriter]:
        """Where a process writes what it has finished."""
        self._shards.mkdir(exist_ok=True)
        shard = self._shards / f"{process_index:05d}.jsonl"
        with open(shard, "ab+") as file:
            file.truncate(sum(map(len, _complete_lines(shard))))  # of a line that was torn
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
        file: To append to.
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


__all__ = ["PredictionDirectory", "PredictionWriter"]
