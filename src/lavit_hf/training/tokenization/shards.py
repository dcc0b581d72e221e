"""Shards of tokenized data, and the formats of their files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple


class Shard(NamedTuple):
    """A stretch of the input: samples from `chunk * shard_size` on, of one of its sources (files of a stream)."""

    source: int
    chunk: int

    @property
    def name(self) -> str:
        return f"{self.source:05d}-{self.chunk:06d}"


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
