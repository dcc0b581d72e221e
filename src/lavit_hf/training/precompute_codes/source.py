"""Reads a dataset shard by shard: one with an index, or a stream."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...utils.claims import Claims
from ..dataset import column_names, first_row, is_transformed, leave_undecoded, locate_image
from .directory import Shard, TokenizedDirectory

Rows = Iterator[tuple[int, Mapping[str, Any]]]

# A stream does not tell how long its sources (files) are before it has read them, so each numbers its samples anew.
_SOURCE_STRIDE = 2**32
_CARRIED = ("prompt", "messages", "sample_id")  # columns that training reads as well
_PROBES = 16


class TokenizedSource:
    """A dataset that is to be tokenized.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset`.
        image_column: One image or a list of images per row.
        text_column: The text, or `None`.
        keep_columns: Further columns to keep.
        shard_size: Samples per shard.

    Raises:
        TypeError: It is no dataset.
        ValueError: It is empty, or a column is missing.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        text_column: str | None,
        keep_columns: Sequence[str],
        shard_size: int,
    ) -> None:
        import datasets  # type: ignore[import-untyped]

        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise TypeError(
                f"Expected a Dataset or IterableDataset of `datasets`, got {type(dataset).__name__}. Of several "
                "splits choose one."
            )
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        self.shard_size = shard_size
        if not self.is_stream and len(dataset) == 0:
            raise ValueError("The dataset is empty.")
        names = column_names(dataset)
        wanted = [image_column, *([text_column] if text_column else []), *keep_columns]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"The dataset has no column {missing[0]!r}; it has {', '.join(map(repr, names))}.")
        self.kept_columns = [name for name in names if name in keep_columns or name in _CARRIED]
        self.columns = [*dict.fromkeys([*wanted, *self.kept_columns])]
        self.dataset = leave_undecoded(dataset, self.columns)
        self.length = None if self.is_stream else len(dataset)

    @property
    def num_sources(self) -> int:
        """Files that a stream is read from; a dataset with an index is a single source."""
        return self.dataset.num_shards if self.is_stream else 1

    def features(self, names: Sequence[str]) -> dict[str, Any]:
        """What `datasets` knows about these columns."""
        import datasets  # type: ignore[import-untyped]

        is_known = self.dataset.features is not None and not is_transformed(self.dataset)
        if not names:
            return {}
        features = (
            self.dataset.features if is_known else datasets.Dataset.from_list([first_row(self.dataset)]).features
        )
        return {name: features[name] for name in names}

    def shards(
        self, rank: int, num_processes: int, directory: TokenizedDirectory, claims: Claims | None = None
    ) -> Generator[tuple[Shard, Rows]]:
        """The unfinished shards of one process, with their rows by sample id.

        Args:
            rank: Which process this is.
            num_processes: Of how many. Who gets which shard depends on it, what is in a shard does not.
            directory: Knows what is finished, and is told how many shards a stream has.
            claims: For processes that do not know how many they are: each gives out what it could claim, for as long
                as the next one is not asked for.
        """
        for source in range(self.num_sources):
            # Streams cannot jump: if there are enough of them, each is left to one process.
            is_undivided = self.is_stream and self.num_sources >= num_processes
            if (is_undivided and source % num_processes != rank) or directory.is_source_finished(source):
                continue
            is_whole = self.is_stream and self.num_sources > 1  # claimed as a whole, as nobody can jump in it
            with _claim(claims if is_whole else None, f"{source:05d}") as is_claimed:
                if not is_claimed or directory.is_source_finished(source):
                    continue
                for chunk, rows in self._stream_chunks(source, directory) if self.is_stream else self._chunks():
                    is_mine = is_undivided or (source + chunk) % num_processes == rank
                    shard = Shard(source, chunk)
                    if not is_mine or directory.is_finished(shard):
                        continue
                    with _claim(None if is_whole else claims, shard.name) as is_claimed:
                        # Looked at again: somebody may have finished it in between.
                        if is_claimed and not directory.is_finished(shard):
                            yield shard, rows

    def num_shards(self) -> int:
        """Shards of a dataset with an index."""
        assert self.length is not None
        return -(-self.length // self.shard_size)

    def _chunks(self) -> Iterator[tuple[int, Rows]]:
        for chunk in range(self.num_shards()):
            start = chunk * self.shard_size
            indices = range(start, min(start + self.shard_size, len(self.dataset)))
            yield chunk, ((index, self.dataset[index]) for index in indices)

    def _stream_chunks(self, source: int, directory: TokenizedDirectory) -> Iterator[tuple[int, Rows]]:
        stream = self.dataset if self.num_sources == 1 else self.dataset.shard(self.num_sources, source)
        chunk = -1
        numbered = enumerate(stream, start=source * _SOURCE_STRIDE)
        for chunk, rows in itertools.groupby(numbered, lambda row: row[0] % _SOURCE_STRIDE // self.shard_size):
            yield chunk, rows
        directory.finish_source(source, chunk + 1)

    def digest(self, image_root: Path | None = None) -> str:
        """Tells datasets apart without reading all of them: by columns, length, and some rows all over them."""
        digest = hashlib.sha256(f"{self.columns} {self.length} {self.num_sources}\n".encode())
        if self.length is None:
            rows = [first_row(self.dataset)]
        else:
            step = max(self.length // _PROBES, 1)
            rows = [self.dataset[index] for index in range(0, self.length, step)]
        for row in rows:
            for name in self.columns:
                digest.update(name.encode())
                digest.update(_content(row[name], image_root))
        return digest.hexdigest()


def _claim(claims: Claims | None, name: str) -> AbstractContextManager[bool]:
    return nullcontext(True) if claims is None else claims.claim(name)


def _content(value: Any, root: Path | None) -> bytes:
    """The same for the same content, wherever its file is."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        if value["bytes"] is not None:
            return value["bytes"]
        path = _file_of(value["path"], root)
        return path.read_bytes() if path and os.path.isfile(path) else str(value["path"]).encode()
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(_content(one, root) for one in value) + b"]"
    if hasattr(value, "tobytes"):
        return value.tobytes()
    return repr(value).encode()


def _file_of(path: str | None, root: Path | None) -> Path | None:
    try:
        return Path(path or "") if root is None else Path(locate_image(path or "", root))
    except ValueError:  # outside of the root: the sample is bad, whatever is in the file
        return None
