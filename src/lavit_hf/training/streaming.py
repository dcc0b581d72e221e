"""Training data that are read shard by shard while training goes on, as they are too large for one disk or one list.

In this order: what is streamed and how it is opened; what of every shard was trained on; the dataset, and how its
shards are read; `Trainer` with such data, whose checkpoints remember what was read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.loading import NamedDataset, load_data, named_errors
from ..utils.atomic_files import write_json
from ..utils.distributed import sum_over_processes
from ..utils.json_files import read_json_object
from ..utils.seeds import sample_seed
from .dataset import find_columns, first_row, leave_undecoded, name_columns, number_row, read_sample, read_sample_id
from .precompute_codes.directory import METADATA
from .precompute_codes.tokenize_dataset import load_tokenized_dataset
from .trainer_checkpoints import ResumableTrainerMixin

logger = logging.get_logger(__name__)

_STATE_FILE = "streamed_data.json"
_VERSION = 1
_DISK_SHARDS = 1024  # of a dataset that lies in Arrow files on the disk, where any row can be reached
_FEW_SHARDS = 128  # below, Parquet is read by row groups instead of files
_MOST_SHARDS = 200_000
_FEWEST_SAMPLES = 100  # of which a share says something
_WARNINGS = 20  # of a reader, about bad samples; further ones are counted only


@dataclass
class MixturePart:
    """A dataset of a mixture, as a recipe names it.

    Attributes:
        path: What `load_data` takes, or a directory of `lavit tokenize`.
        weight: How many samples are taken from it, in proportion to the weights of the others.
        split: Which split.
        config: Which configuration of a dataset on the Hub.
        image_column: Where the images are; rows of text alone need no such column.
        text_column: Where the text is.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    config: str | None = None
    image_column: str = "image"
    text_column: str = "text"


@dataclass
class StreamArguments:
    """Options of a training script for data that are read while it trains; for [`parse_script_arguments`]."""

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read Parquet, WebDataset, Arrow or JSON files (a folder, a pattern like 'shards/*.tar', or a "
            "name of the Hub) while training goes on. Needs --max_steps."
        },
    )
    mixture: list[MixturePart] | None = field(
        default=None,
        metadata={
            "help": "Several datasets to stream in the place of --dataset, which is for evaluation then. In a YAML "
            "file each is a path, or a mapping with path, weight, split, config, image_column and text_column; here "
            "they are paths, with equal weights."
        },
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Streamed rows that a reader shuffles at a time, and has in memory."}
    )
    max_bad_share: float = field(
        default=0.1, metadata={"help": "A larger share of bad streamed samples stops the run."}
    )

    @property
    def is_used(self) -> bool:
        """Whether anything is to be streamed."""
        return self.streaming or self.mixture is not None

    def load(
        self,
        args: TrainingArguments,
        dataset: str | None,
        split: str = "train",
        image_column: str = "image",
        text_column: str | None = "text",
        **options: Any,
    ) -> StreamedTrainingDataset:
        """Opens what is named.

        Args:
            args: Options of the training.
            dataset: What `load_data` takes. A mixture goes before it.
            split: Which split of it.
            image_column: Where its images are.
            text_column: Where its text is; `None` if images alone do, also for a mixture.
            options: Further arguments of [`load_stream`].

        Raises:
            ValueError: If there is nothing to read, or no end.
        """
        if not dataset and not self.mixture:
            raise ValueError("Name what to train on: a dataset or a mixture.")
        if args.max_steps <= 0:
            raise ValueError("Streamed data have no end: max_steps has to say when training is over.")
        parts = self.mixture or [
            MixturePart(str(dataset), split=split, image_column=image_column, text_column=text_column or "text")
        ]
        options = {**options, "seed": args.seed}
        options |= {"shuffle_buffer": self.shuffle_buffer, "max_bad_share": self.max_bad_share}
        return load_stream(parts, needs_text=text_column is not None, **options)


@dataclass
class StreamSource:
    """A stream, and what of its rows is learned.

    Attributes:
        dataset: A `datasets.IterableDataset`. Images need not be decoded before.
        image_column: As in [`TrainingDataset`].
        text_column: As in [`TrainingDataset`].
        weight: How many samples are taken from it, in proportion to the weights of the others.
        image_root: As in [`TrainingDataset`].
        name: What messages call it.
    """

    dataset: Any
    image_column: str = "image"
    text_column: str | None = "text"
    weight: float = 1.0
    image_root: str | os.PathLike[str] | None = None
    name: str = "the dataset"
    num_shards: int = field(init=False, default=1)
    reads_images: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        import datasets  # type: ignore[import-untyped]

        if not isinstance(self.dataset, datasets.IterableDataset):
            raise TypeError(
                f"{self.name} has to be a datasets.IterableDataset, got {type(self.dataset).__name__}; that of "
                "load_dataset(..., streaming=True), say, or of Dataset.to_iterable_dataset(num_shards=...)."
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"The weight of {self.name} has to be positive, got {self.weight!r}.")
        with named_errors(self.name):
            names = list(self.dataset.column_names or first_row(self.dataset))
        self.image_column = find_columns(names, self.image_column, self.text_column)
        self.reads_images = self.image_column in names and self.image_column != "codes"
        wanted = {self.image_column, "codes", self.text_column, "prompt", "messages", "sample_id", "__key__"}
        self.dataset = leave_undecoded(self.dataset, [name for name in names if name in wanted])
        self.num_shards = self.dataset.num_shards
        if self.num_shards > _MOST_SHARDS:
            raise ValueError(
                f"{self.name} has {self.num_shards} shards, which would take longer to find than to read. Is each a "
                "single picture? Pack them into Parquet or WebDataset files of some thousand."
            )

    def read(self, row: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        """A row as [`TrainingDataset`] gives it out.

        Raises:
            ValueError: If it is bad.
        """
        named = name_columns(row, self.image_column, self.text_column)
        sample = read_sample(named, needs_text=self.text_column is not None, image_root=self.image_root)
        sample["sample_id"] = number_row(named) if row.get("sample_id") is None else read_sample_id(row, 0)
        sample["epoch"] = epoch
        return sample


def load_stream(
    parts: Sequence[MixturePart],
    needs_text: bool = True,
    visual_tokenizer: Any = None,
    num_scenes: int = 10_000,
    **options: Any,
) -> StreamedTrainingDataset:
    """Opens the datasets of a mixture, or a single one, to be read while training goes on.

    Args:
        parts: What to read.
        needs_text: Whether images alone will not do.
        visual_tokenizer: Whose codes those of `lavit tokenize` have to be, or a model that has one.
        num_scenes: How many scenes to make, for the names of made worlds.
        options: Arguments of [`StreamedTrainingDataset`].

    Raises:
        OSError: The system does not let one of them be read.
        ValueError: One of them does not exist, is damaged, or lacks a column.
    """
    sources = []
    for part in parts:
        if (Path(part.path) / METADATA).is_file():
            rows, root = load_tokenized_dataset(part.path, visual_tokenizer), None
            rows = rows.to_iterable_dataset(num_shards=min(len(rows), _DISK_SHARDS))
        else:
            rows, root = load_data(
                part.path, part.split, part.config, streaming=True, num_scenes=num_scenes, num_shards=_DISK_SHARDS
            )
        if rows.num_shards < _FEW_SHARDS:
            rows = rows.reshard()
        text_column = part.text_column if needs_text else None
        sources.append(StreamSource(rows, part.image_column, text_column, part.weight, root, part.path))
    return StreamedTrainingDataset(sources, **options)


def load_rows(
    name: str,
    split: str,
    *,
    num_rows: int | None = None,
    streaming: bool = False,
    visual_tokenizer: Any = None,
    num_scenes: int = 10_000,
) -> NamedDataset:
    """Loads what a script trains or evaluates on: what `lavit tokenize` wrote, or anything that `load_data` takes.

    Args:
        name: A directory of `lavit tokenize`, or what `load_data` takes.
        split: Which split; a directory of `lavit tokenize` has none.
        num_rows: How many rows at most, the first ones.
        streaming: Whether no more than those are to be read.
        visual_tokenizer: Whose codes those of `lavit tokenize` have to be, or a model that has one.
        num_scenes: How many scenes to make, for the names of made worlds, unless `num_rows` says it.

    Returns:
        For [`TrainingDataset`], with the directory that paths in it must not leave.

    Raises:
        ValueError: It does not exist, is not complete, is damaged, or has the codes of another visual tokenizer.
    """
    if (Path(name) / METADATA).is_file():
        found = NamedDataset(load_tokenized_dataset(name, visual_tokenizer), None)
    elif streaming and num_rows is not None:
        return _load_first_rows(name, split, num_rows)
    else:
        found = load_data(name, split, num_scenes=num_scenes if num_rows is None else num_rows)
    if num_rows is None or len(found.dataset) <= num_rows:
        return found
    return NamedDataset(found.dataset.select(range(num_rows)), found.root)


def _load_first_rows(name: str, split: str, num_rows: int) -> NamedDataset:
    """The first rows of a dataset, of which no more is read."""
    rows, root = load_data(name, split, streaming=True, num_scenes=num_rows)
    with named_errors(name):
        rows = leave_undecoded(rows, list(rows.column_names or first_row(rows)))
        return NamedDataset(list(rows.take(num_rows)), root)


class ShardProgress(NamedTuple):
    """What of a shard was trained on.

    Attributes:
        passes: How often it was read to its end.
        rows: Rows of the pass that has begun.
        num_read: Rows in all passes.
        num_bad: Bad ones among them.
        is_damaged: Whether it could not be read to its end.
    """

    passes: int = 0
    rows: int = 0
    num_read: int = 0
    num_bad: int = 0
    is_damaged: bool = False


@dataclass
class _Progress:
    """Of some shards, by source and number, with the samples that readers took from every source."""

    shards: dict[tuple[int, int], ShardProgress] = field(default_factory=dict)
    drawn: dict[int, list[int]] = field(default_factory=dict)

    def update(self, later: _Progress) -> None:
        self.shards.update(later.shards)
        self.drawn.update(later.drawn)

    def of(self, source: int, shard: int) -> ShardProgress:
        return self.shards.get((source, shard), ShardProgress())


class StreamedTrainingDataset(IterableDataset):
    """Samples of shards (files, or row groups of Parquet), for ever: what was read is read again in another order.

    Every *reader* (a worker process of a data loader, or the process itself) has shards of its own, and reads them one
    after another: those first that it has read least often, in an order that follows from the seed. Within a shard,
    `shuffle_buffer` rows are shuffled at a time. What of every shard was trained on is therefore two numbers, and
    [`StreamTrainer`] has them in its checkpoints. A run that goes on from there
    - with as many processes and workers is bit-equal to one that was not interrupted,
    - with others reads no row again that was trained on in a pass over its shard, and all that were not, in another
      order.

    Readers do not wait for one another: one that is through with its shards reads them again while others are not.

    Bad samples (as in [`TrainingDataset`]) are left out and counted, and so are shards that are damaged, from the
    damage on. Samples are numbered by their content, or by a column `sample_id`.

    Args:
        sources: What to read; a single `datasets.IterableDataset` also does, with columns `image` and `text`.
        shuffle_buffer: How many rows are shuffled at a time, and in memory; 1 leaves rows of a shard in their order.
        seed: Decides about the order.
        on_bad_sample: `"skip"`, or `"raise"` to stop at the first one.
        max_bad_share: With `"skip"`, training stops if more than this share of a reader's samples of a source are bad,
            of at least 100, or of its shards damaged, if it is more than one.

    Raises:
        TypeError: If a source is no stream.
        ValueError: If a source lacks a column, or an option is out of range.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource] | Any,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        on_bad_sample: str = "skip",
        max_bad_share: float = 0.1,
    ) -> None:
        super().__init__()
        self.sources = list(sources) if isinstance(sources, (list, tuple)) else [StreamSource(sources)]
        if not self.sources:
            raise ValueError("There is nothing to read: no dataset is named.")
        if shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1, got {shuffle_buffer}.")
        if on_bad_sample not in ("skip", "raise"):
            raise ValueError(f"`on_bad_sample` must be 'skip' or 'raise', got {on_bad_sample!r}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be in [0, 1], got {max_bad_share}.")
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self._progress = _Progress()
        self._num_batches = 0  # of each process
        self._layout = (1, 1)  # processes, and readers of each
        self._process = 0

    @property
    def image_column(self) -> str:
        """Where images are; `"codes"` if no source has any."""
        return next((source.image_column for source in self.sources if source.reads_images), "codes")

    @property
    def num_bad_samples(self) -> int:
        """Of what this process was trained on, and of what others were up to the checkpoint that it went on from."""
        return sum(shard.num_bad for shard in self._progress.shards.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples from where training is, without moving it on; those of workers of a data loader are different."""
        return (sample for sample, _ in self._read())

    def batches(
        self,
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], Any],
        process: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        **options: Any,
    ) -> DataLoader:
        """Batches for one of several processes. What is read ahead counts only when it is given out.

        Args:
            batch_size: Samples per batch.
            collate: Makes a batch of them.
            process: Which process this is.
            num_processes: Of how many.
            num_workers: Worker processes of this one.
            options: Further arguments of `DataLoader`.

        Raises:
            ValueError: If there are more readers than shards.
        """
        layout = (num_processes, max(num_workers, 1))
        readers = layout[0] * layout[1]
        for source in self.sources:
            if source.num_shards < readers:
                raise ValueError(
                    f"{source.name} has {source.num_shards} shard(s), and each of {readers} readers ({layout[0]} "
                    f"process(es) with {layout[1]} worker(s)) needs one of its own: split it into more files, or take "
                    "fewer workers (--dataloader_num_workers)."
                )
        if layout != self._layout:
            self._progress.drawn, self._num_batches = {}, 0
        self._layout, self._process = layout, process
        return _StreamLoader(
            _Readers(self),
            batch_size=batch_size,
            collate_fn=_CollateWithProgress(collate),
            num_workers=num_workers,
            **options,
        )

    def _advance(self, progress: _Progress) -> None:
        self._progress.update(progress)
        self._num_batches += 1

    def _read(self) -> Iterator[tuple[dict[str, Any], _Progress]]:
        """Samples of this process or worker, each with what has been read since the one before."""
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # The next batch is that of the first worker, whoever gave the last one before an interruption.
        own = 0 if worker is None else (worker.id + self._num_batches) % workers
        number = self._process * workers + own
        drawn = list(self._progress.drawn.get(number, [0] * len(self.sources)))
        readers = [
            _SourceReader(self, index, self._progress, number, self._layout[0] * workers)
            for index in range(len(self.sources))
        ]
        samples = [iter(reader) for reader in readers]
        while True:
            # Exactly in proportion, and as evenly as possible.
            index = min(range(len(drawn)), key=lambda index: ((drawn[index] + 1) / self.sources[index].weight, index))
            sample, shards = next(samples[index])
            drawn[index] += 1
            yield sample, _Progress(shards, {number: list(drawn)})

    def counts(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """What was read in all processes, for a log: bad samples, damaged shards, and passes over every source.

        Args:
            device: Where the processes meet.
        """
        counts = []
        for index, source in enumerate(self.sources):
            own = [self._progress.of(index, shard) for shard in range(source.num_shards) if self._is_own(shard)]
            counts.append([sum(shard.num_bad for shard in own), sum(shard.is_damaged for shard in own)])
            counts[-1].append(sum(shard.passes for shard in own))
        totals = sum_over_processes(torch.tensor(counts, device=device)).tolist()
        passes = [total[2] / source.num_shards for total, source in zip(totals, self.sources, strict=True)]
        names = ["passes"] if len(passes) == 1 else [f"passes_{index}" for index in range(len(passes))]
        return {
            "bad_samples": sum(total[0] for total in totals),
            "damaged_shards": sum(total[1] for total in totals),
            **dict(zip(names, passes, strict=True)),
        }

    def _is_own(self, shard: int) -> bool:
        processes, workers = self._layout
        return shard % (processes * workers) // workers == self._process

    def state_dict(self) -> dict[str, Any]:
        """What was trained on, in all processes, which have to call this together: for JSON."""
        for part in gather_object([self._progress]):
            self._progress.update(_only_new(part, self))
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "shards": [
                [[int(value) for value in self._progress.of(index, shard)] for shard in range(source.num_shards)]
                for index, source in enumerate(self.sources)
            ],
            "layout": list(self._layout),
            "drawn": sorted([reader, drawn] for reader, drawn in self._progress.drawn.items()),
            "num_batches": self._num_batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: It is damaged, or that of other data or settings.
        """
        settings = self._settings()
        found = state.get("settings")
        if state.get("version") != _VERSION or not isinstance(found, dict):
            raise ValueError("it is damaged, or of another version of this package")
        if changed := [name for name, value in settings.items() if found.get(name) != value]:
            differences = ", ".join(
                f"{name} was {found.get(name)!s:.60}, is {settings[name]!s:.60}" for name in changed
            )
            raise ValueError(f"it was written with other data or settings ({differences})")
        try:
            progress = _Progress(
                {
                    (index, shard): ShardProgress._make([*_counts(values[:4], 4), bool(values[4])])
                    for index, source in enumerate(self.sources)
                    for shard, values in zip(range(source.num_shards), state["shards"][index], strict=True)
                    if any(values)
                },
                {int(reader): _counts(drawn, len(self.sources)) for reader, drawn in state["drawn"]},
            )
            processes, workers = _counts(state["layout"], 2)
            (num_batches,) = _counts([state["num_batches"]], 1)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"it is damaged ({error!r:.100})") from error
        self._progress, self._layout, self._num_batches = progress, (processes, workers), num_batches

    def _settings(self) -> dict[str, Any]:
        """What the numbers of shards and rows depend on."""
        return {
            "num_shards": [source.num_shards for source in self.sources],
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }


def _counts(values: Any, length: int) -> list[int]:
    if len(values) != length or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r} are no {length} counts")
    return list(values)


def _only_new(part: _Progress, stream: StreamedTrainingDataset) -> _Progress:
    """What of another process's progress it read itself, and not before the checkpoint that both went on from."""
    known = stream._progress
    shards = {
        key: shard
        for key, shard in part.shards.items()
        if (shard.passes, shard.rows) > (known.of(*key).passes, known.of(*key).rows)
    }
    drawn = {number: drawn for number, drawn in part.drawn.items() if sum(drawn) > sum(known.drawn.get(number, []))}
    return _Progress(shards, drawn)


class _SourceReader:
    """The shards of one source that are one reader's: its samples without end, and what was read for each."""

    def __init__(
        self, stream: StreamedTrainingDataset, index: int, progress: _Progress, reader: int, num_readers: int
    ) -> None:
        self.stream, self.index, self.source = stream, index, stream.sources[index]
        own = range(reader, self.source.num_shards, num_readers)
        self.progress = {shard: progress.of(index, shard) for shard in own}
        self._num_warnings = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[tuple[int, int], ShardProgress]]]:
        new: dict[tuple[int, int], ShardProgress] = {}  # since the last sample
        num_fruitless = 0  # shards in a row without a sample
        while num_fruitless < 2 * len(self.progress):
            shard = min(self.progress, key=self._turn)
            num_fruitless += 1
            for row in self._rows(shard):
                sample = self._read(row, shard)
                new[self.index, shard] = self.progress[shard]
                if sample is not None:
                    num_fruitless = 0
                    yield sample, new
                    new = {}
            done = self.progress[shard]
            self.progress[shard] = new[self.index, shard] = done._replace(passes=done.passes + 1, rows=0)
        raise ValueError(f"{self.source.name} has no sample that can be used in {len(self.progress)} of its shards.")

    def _turn(self, shard: int) -> tuple[int, bool, int]:
        """The shard with the lowest is next: what was read least often, what has been begun, and by chance."""
        progress = self.progress[shard]
        purpose = f"shards of source {self.index}"
        return progress.passes, progress.rows == 0, sample_seed(self.stream.seed, progress.passes, shard, purpose)

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard that are not read yet in this pass, in their order."""
        size, epoch, start = self.stream.shuffle_buffer, self.progress[shard].passes, self.progress[shard].rows
        block, read = divmod(start, size)
        stream = self.source.dataset.shard(num_shards=self.source.num_shards, index=shard)
        # Not `iter(stream)`, of which each worker of a data loader would get a part.
        rows = (stream.skip(block * size) if block else stream).iter(batch_size=1)
        while True:
            buffer: list[dict[str, Any]] = []
            is_damaged = False
            try:
                while len(buffer) < size:
                    with named_errors(self.source.name):
                        row = next(rows, None)
                    if row is None:
                        break
                    buffer.append({name: value[0] for name, value in row.items()})
            except ValueError as error:
                self._report_damage(shard, error)
                is_damaged = True
            purpose = f"rows of source {self.index}, block {block}"
            generator = np.random.default_rng(sample_seed(self.stream.seed, epoch, shard, purpose))
            order = generator.permutation(len(buffer))
            for position in order[read:]:
                yield buffer[position]
            if is_damaged or len(buffer) < size:
                return
            block, read = block + 1, 0

    def _read(self, row: Mapping[str, Any], shard: int) -> dict[str, Any] | None:
        """The sample of a row; `None` if it is bad. Either is counted."""
        before = self.progress[shard]
        self.progress[shard] = before._replace(rows=before.rows + 1, num_read=before.num_read + 1)
        try:
            return self.source.read(row, before.passes)
        except ValueError as error:
            key = "" if row.get("__key__") is None else f" {row['__key__']!r:.80}"
            message = f"Sample{key} of {self.source.name}, shard {shard}, is bad"
            if self.stream.on_bad_sample == "raise":
                raise ValueError(f"{message}: {error}") from error
            self.progress[shard] = self.progress[shard]._replace(num_bad=before.num_bad + 1)
            self._warn(f"{message} and left out: {error}")
            num_read = sum(progress.num_read for progress in self.progress.values())
            num_bad = sum(progress.num_bad for progress in self.progress.values())
            if num_read >= _FEWEST_SAMPLES and num_bad > self.stream.max_bad_share * num_read:
                raise ValueError(
                    f"{num_bad} of {num_read} samples of {self.source.name} are bad, more than max_bad_share "
                    f"({self.stream.max_bad_share:g}) allows. The last one: {error}"
                ) from error
            return None

    def _report_damage(self, shard: int, error: ValueError) -> None:
        message = f"Shard {shard} of {self.source.name} is damaged"
        if self.stream.on_bad_sample == "raise":
            raise ValueError(f"{message}: {error}") from error
        self.progress[shard] = self.progress[shard]._replace(is_damaged=True)
        logger.warning(f"{message}, and the rest of it left out: {error}")
        num_damaged = sum(progress.is_damaged for progress in self.progress.values())
        if num_damaged > max(1, self.stream.max_bad_share * len(self.progress)):
            raise ValueError(
                f"{num_damaged} of {len(self.progress)} shards of {self.source.name} are damaged, more than "
                f"max_bad_share ({self.stream.max_bad_share:g}) allows. The last one: {error}"
            ) from error

    def _warn(self, message: str) -> None:
        self._num_warnings += 1
        if self._num_warnings <= _WARNINGS:
            rest = " Further bad samples are counted only." if self._num_warnings == _WARNINGS else ""
            logger.warning(message + rest)


class _Readers(IterableDataset):
    """What a data loader and its workers iterate over: samples with what was read for them."""

    def __init__(self, stream: StreamedTrainingDataset) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[dict[str, Any], _Progress]]:
        if get_worker_info() is not None:
            import fsspec.asyn  # type: ignore[import-untyped]

            fsspec.asyn.reset_lock()  # as `datasets` does: a forked process would wait for a thread that it lacks
        return self.stream._read()


class _CollateWithProgress:
    """A batch with what was read for it."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, read: list[tuple[dict[str, Any], _Progress]]) -> tuple[Any, _Progress]:
        progress = _Progress()
        for _, later in read:
            progress.update(later)
        return self.collate([sample for sample, _ in read]), progress


class _StreamLoader(DataLoader):
    """A `DataLoader` that tells the stream what of it was given out."""

    dataset: _Readers

    def __iter__(self) -> Any:
        for batch, progress in super().__iter__():
            self.dataset.stream._advance(progress)
            yield batch


class StreamTrainerMixin(ResumableTrainerMixin):
    """Makes a `Trainer` read a [`StreamedTrainingDataset`], and go on in the middle of it.

    `streamed_data.json` in every checkpoint says what was trained on; the log gets `bad_samples`, `damaged_shards` and
    `passes`, how often the data were read on average. With any other dataset, see [`ResumableTrainerMixin`].
    """

    def get_train_dataloader(self: Any) -> DataLoader:
        """Batches of the readers of this process. accelerate would have one process read for all."""
        if not isinstance(self.train_dataset, StreamedTrainingDataset):
            return super().get_train_dataloader()  # type: ignore[misc]
        args = self.args
        return self.train_dataset.batches(
            args.train_batch_size,
            self.data_collator,
            args.process_index,
            args.world_size,
            args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As that of `Trainer`.

        Raises:
            FileExistsError: If `output_dir` has checkpoints and none is to be resumed from.
            ValueError: If the checkpoint does not say what was read, or is of other data or settings.
        """
        if isinstance(self.train_dataset, StreamedTrainingDataset):
            self.args.ignore_data_skip = True  # the readers skip, and faster
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint:
                _load_progress(self.train_dataset, Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of an update; none if a finished run is resumed, which `Trainer` would give another update."""
        is_over = self.state.global_step >= self.state.max_steps
        return super().get_batch_samples(iter(()) if is_over else epoch_iterator, *args, **kwargs)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As that of `Trainer`; while it is running, with what was read."""
        super().save_model(output_dir, *args, **kwargs)
        if self.is_in_train and isinstance(self.train_dataset, StreamedTrainingDataset):
            state = self.train_dataset.state_dict()
            if self.args.should_save:
                write_json(Path(output_dir or self.args.output_dir, _STATE_FILE), state)

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As that of `Trainer`, with counts; `epoch` is the share of the run, as data without end have no other."""
        if isinstance(self.train_dataset, StreamedTrainingDataset):
            self.state.epoch = self.state.global_step / max(self.state.max_steps, 1)
            if "loss" in logs:
                logs |= self.train_dataset.counts(self.args.device)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class StreamTrainer(StreamTrainerMixin, Trainer):
    """`Trainer` for a [`StreamedTrainingDataset`] as well; it needs `max_steps`, as such data have no end.

    What workers leave of a batch to the main process ([`LavitDataCollator`] with `encode_later`) is done here.
    """

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of an update, finished."""
        return super().get_batch_samples(map(self._finish, epoch_iterator), *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As that of `Trainer`, with a batch that is finished."""
        return super().prediction_step(model, self._finish(inputs), *args, **kwargs)

    def _finish(self, batch: Any) -> Any:
        finish = getattr(self.data_collator, "finish", None)
        return batch if finish is None else finish(batch)


def _load_progress(dataset: StreamedTrainingDataset, checkpoint: Path) -> None:
    path = checkpoint / _STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} does not say what was read: it has no {_STATE_FILE}, as it was written without streaming. "
            "Go on as it was begun, or start a new run in another output_dir."
        )
    try:
        dataset.load_state_dict(read_json_object(path, ValueError))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}. Resume from another checkpoint, or start anew.") from error
