r"""The directory that tokenization writes.

```text
tokenization.json          what the codes were made by and of; in the end also counts and bad samples
data/00000-000003.arrow    rows of source 0 from sample 3 * shard_size on (or .tar)
progress/00000-000003.json what became of these samples; written last, so that a shard without it is made again
progress/claims/           who works on what, of workers that know nothing of one another
dataset_info.json, state.json, README.md    in the end: make it one dataset
```
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...utils.atomic_files import check_resumable, complete_file, remove_partials, write_json
from ...utils.claims import Claims
from ...utils.json_files import read_json_object
from ...utils.public_text import one_line, public_name

METADATA = "tokenization.json"
_VERSION = 1
_COUNTS = ("num_samples", "num_rows", "num_images", "num_codes")
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "data/*{suffix}"
---

# Images as visual codes

Made by `lavit tokenize` with {checkpoint}; `tokenization.json` says how. Only models with the same codebook understand
these codes.
"""


@dataclass
class TokenizationReport:
    """What became of a dataset.

    Attributes:
        path: The directory.
        num_samples: Samples read.
        num_rows: Rows written; the others are bad.
        num_images: Images in them.
        num_codes: Codes of these images.
        bad_samples: The id of every bad sample, and what is wrong with it.
    """

    path: Path
    num_samples: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_codes: int = 0
    bad_samples: list[tuple[int, str]] = field(default_factory=list)

    def add(self, part: Mapping[str, Any]) -> None:
        """Adds what `counts` gave."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + part[name])
        self.bad_samples += [(sample_id, reason) for sample_id, reason in part["bad_samples"]]

    def counts(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "bad_samples": [list(bad) for bad in self.bad_samples]}


class TokenizedDirectory:
    """Shards that are finished, and those that are not.

    Args:
        path: The directory; all processes and machines have to see the same.
        output_format: One of `FORMATS`.
        features: Those of the rows, as `datasets.Features`.
    """

    def __init__(self, path: str | Path, output_format: str, features: Any) -> None:
        self.path = Path(path)
        self.format = FORMATS[output_format]
        self.features = features
        self.claims = Claims(self._progress / "claims")

    def open(self, about: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Creates the directory, or makes sure that what is there may be continued.

        Args:
            about: What is written down for people to know.
            settings: What must not change between two runs.

        """
        metadata = self.path / METADATA
        found = _read_metadata(metadata)["settings"] if metadata.exists() else None
        try:
            check_resumable(self.path, "tokenized data", settings, found)
        except ValueError:
            if found is None and metadata.exists():  # another worker has just begun
                return self.open(about, settings)
            raise
        if found is None:
            self.path.mkdir(parents=True, exist_ok=True)
            # Before all else: a directory that does not say what it is belongs to somebody.
            write_json(metadata, {"version": _VERSION, **about, "settings": dict(settings), "is_complete": False})
        if found is None or not self.is_complete:
            for folder in (self._data, self.claims.folder):
                folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_complete(self) -> bool:
        return _read_metadata(self.path / METADATA)["is_complete"]

    def is_finished(self, shard: Shard) -> bool:
        return (self._progress / f"{shard.name}.json").exists()

    def finish(self, shard: Shard, rows: Sequence[dict[str, Any]], report: TokenizationReport) -> None:
        """Writes the rows of a shard, and then that they are there."""
        if rows and self._progress.is_dir():
            with complete_file(self._data / (shard.name + self.format.suffix)) as file:
                self.format.write(file, rows, self.features)
        self._note(f"{shard.name}.json", report.counts())

    def finish_source(self, source: int, num_shards: int) -> None:
        """Notes how many shards a source has, which of a stream is known only when it was read to its end."""
        self._note(f"{source:05d}-end.json", {"num_shards": num_shards})

    def _note(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            write_json(self._progress / name, content)
        except FileNotFoundError:
            if not self.is_complete:  # or others were faster, and all is done
                raise

    def is_source_finished(self, source: int) -> bool:
        """Whether all shards of a source are known and finished."""
        return (self._progress / f"{source:05d}-end.json").exists() and all(
            map(self.is_finished, self._shards(source))
        )

    def _shards(self, source: int) -> list[Shard]:
        path = self._progress / f"{source:05d}-end.json"
        count = read_json_object(path, ValueError).get("num_shards")
        if type(count) is not int:
            raise _damaged(path, path)
        return [Shard(source, chunk) for chunk in range(count)]

    def merge(self, num_sources: int) -> None:
        """Makes one dataset of all shards, once every source is read and every shard is finished.

        Raises:
            RuntimeError: A shard is missing, as if processes worked on different directories.
            ValueError: Every sample is bad.
        """
        report, files = TokenizationReport(self.path), []
        for source in range(num_sources):
            for shard in self._shards(source):
                if not self.is_finished(shard):
                    raise RuntimeError(
                        f"Shard {shard.name} is missing in {self.path}. All processes and machines have to write to "
                        "the same directory; run the same command again to make what is missing."
                    )
                counts = _read_counts(self._progress / f"{shard.name}.json")
                report.add(counts)
                if counts["num_rows"]:
                    files.append(f"{self._data.name}/{shard.name}{self.format.suffix}")
        if not files:
            reason = f"; the first one: {report.bad_samples[0][1]}" if report.bad_samples else ""
            raise ValueError(f"None of the {report.num_samples} samples can be used{reason}.")
        metadata = {**_read_metadata(self.path / METADATA), "is_complete": True, **report.counts()}
        if self.format.write is write_arrow:
            # What `datasets` caches results of `map` and the like by.
            content = json.dumps([metadata["settings"], report.counts()], sort_keys=True)
            self._describe(files, hashlib.sha256(content.encode()).hexdigest()[:16])
        checkpoint = one_line(public_name(metadata["checkpoint"]))
        card = _CARD.format(suffix=self.format.suffix, checkpoint=f"`{checkpoint.replace('`', '')}`")
        (self.path / "README.md").write_text(card, encoding="utf-8")
        remove_partials(self._data)
        write_json(self.path / METADATA, metadata)
        shutil.rmtree(self.claims.folder, ignore_errors=True)  # first: nothing can be claimed any more
        shutil.rmtree(self._progress, ignore_errors=True)

    def report(self) -> TokenizationReport:
        """What became of the dataset, once merged."""
        report = TokenizationReport(self.path)
        report.add(_read_counts(self.path / METADATA))
        return report

    def _describe(self, files: list[str], fingerprint: str) -> None:
        """Writes what `load_from_disk` looks for; the shards stay as they are, and are not copied."""
        import datasets  # type: ignore[import-untyped]

        with tempfile.TemporaryDirectory() as folder:
            # Whatever this version of `datasets` writes for such columns.
            empty = datasets.Dataset.from_dict({name: [] for name in self.features}, features=self.features)
            empty.save_to_disk(folder)
            info, state = (read_json_object(Path(folder) / name) for name in ("dataset_info.json", "state.json"))
        write_json(self.path / "dataset_info.json", info)
        state = {**state, "_data_files": [{"filename": name} for name in files], "_fingerprint": fingerprint}
        write_json(self.path / "state.json", state)

    @property
    def _data(self) -> Path:
        return self.path / "data"

    @property
    def _progress(self) -> Path:
        return self.path / "progress"


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What a directory of tokenized data says about itself.

    Raises:
        ValueError: It is no such directory, it is damaged, or tokenization was not finished.
    """
    metadata = Path(path) / METADATA
    if not metadata.is_file():
        raise ValueError(f"{path} holds no tokenized data: it has no {METADATA}. `lavit tokenize` makes it.")
    content = _read_metadata(metadata)
    if not content["is_complete"]:
        raise ValueError(f"{path} is incomplete; run `lavit tokenize` again to continue where it stopped.")
    return content


def _read_metadata(path: Path) -> dict[str, Any]:
    content = read_json_object(path, ValueError)
    settings = content.get("settings")
    is_whole = isinstance(settings, dict) and settings.get("output_format") in list(FORMATS)
    if not is_whole or not isinstance(content.get("is_complete"), bool) or "codebook_fingerprint" not in content:
        raise _damaged(path, path.parent)
    return content


def _read_counts(path: Path) -> dict[str, Any]:
    """What `TokenizationReport.counts` gave, of a shard or of everything."""
    content = read_json_object(path, ValueError)
    bad = content.get("bad_samples")
    is_whole = isinstance(bad, list) and all(isinstance(one, list) and len(one) == 2 for one in bad)
    if not is_whole or any(type(content.get(name)) is not int for name in _COUNTS):
        raise _damaged(path, path.parent if path.name == METADATA else path)
    return content


def _damaged(path: Path, again: Path) -> ValueError:
    return ValueError(f"{path} is damaged. Remove {again}, and run `lavit tokenize` again.")


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
    """How shards are stored."""

    suffix: str
    write: Callable[[BinaryIO, Sequence[dict[str, Any]], Any], None]


FORMATS = {"arrow": Format(".arrow", write_arrow), "webdataset": Format(".tar", write_tar)}
