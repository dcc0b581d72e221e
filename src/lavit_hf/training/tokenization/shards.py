"""Shards of tokenized data as files: there as a whole, or not at all."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PARTIAL = ".partial"  # suffix of files that are being written


class Shard(NamedTuple):
    """A stretch of the input: samples from `chunk * shard_size` on, of one of its sources (files of a stream)."""

    source: int
    chunk: int

    @property
    def name(self) -> str:
        return f"{self.source:05d}-{self.chunk:06d}"


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk; killing leaves a partial one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is never half there."""
    with complete_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_arrow(file: BinaryIO, rows: Sequence[dict[str, Any]], features: Any) -> None:
    """Rows as `datasets` itself saves them."""
    import datasets  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

    table = datasets.Dataset.from_list(list(rows), features=features).data.table
    with pyarrow.ipc.new_stream(file, features.arrow_schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def write_tar(file: BinaryIO, rows: Sequence[dict[str, Any]], features: Any) -> None:
    """Rows as WebDataset reads them: one JSON file each, named by the sample's id; the same bytes every time."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            content = json.dumps(row, ensure_ascii=False).encode()
            entry = tarfile.TarInfo(f"{row['sample_id']:016d}.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


class Format(NamedTuple):
    """How shards are stored, and which builder of `datasets` reads them."""

    suffix: str
    write: Callable[[BinaryIO, Sequence[dict[str, Any]], Any], None]
    builder: str


FORMATS = {
    "arrow": Format(".arrow", write_arrow, "arrow"),
    "webdataset": Format(".tar", write_tar, "webdataset"),
}
