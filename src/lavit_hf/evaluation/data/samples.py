"""Samples of every kind of data: the two types, made scenes, and rows of datasets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...data.loading import load_data
from ...data.scenes import PortableRng
from ...data.worlds import WORLDS, World
from ...processing.tokenization_lavit import check_text
from ...training.dataset import read_images
from ..benchmarks import Benchmark

_PROBES = 16


@dataclass(frozen=True)
class EvaluationSample:
    """One image, and what is known about it.

    Attributes:
        id: Unique in its data; also the name of files that are made of the sample.
        image: A path, or what `datasets` gives; read it by [`~EvaluationSample.open_image`].
        references: Right captions, or right answers to `question`.
        question: What is asked about the image, if something is.
        meta: What else scores depend on, such as the kind of the question; has to be JSON.
        image_root: Where a path of the image starts, which must not leave it; `None` if it is the caller's own.
    """

    id: str
    image: Any
    references: tuple[str, ...] = ()
    question: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    image_root: Path | None = None

    def open_image(self) -> Image.Image:
        """Reads the image, upright and as RGB.

        Raises:
            ValueError: It is missing or corrupt, or not in its root.
        """
        try:
            (image,) = read_images(self.image, self.image_root)
        except ValueError as error:
            raise ValueError(f"Sample {self.id}: the image cannot be read ({error}).") from error
        return image

    def image_key(self) -> str | bytes:
        """Returns what samples of the same image have in common, as far as that can be told without decoding it."""
        image = self.image
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, Image.Image):
            image = image.tobytes()
        if isinstance(image, bytes):
            return hashlib.sha256(image).digest()
        return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"sample {self.id}"


@dataclass(frozen=True)
class EvaluationData:
    """Samples in their fixed order.

    Attributes:
        name: The name that the user gave.
        split: The split that they are of, if the data has splits.
        samples: The samples; each may be read only when it is asked for.
        caption_metrics: The metrics that score captions of them.
        answer_metric: The metric that scores answers.
        world: The world that they are of, in which a program can tell what is true about each image (`meta["scene"]`).
        is_benchmark: Whether tasks use the settings of the paper on it, whatever the checkpoint's own are.
        benchmark: The benchmark of the paper that it was found as; `None` of files that were named one by one.
    """

    name: str
    split: str | None
    samples: Sequence[EvaluationSample]
    caption_metrics: tuple[str, ...] = ("cider", "bleu")
    answer_metric: str = "exact_match"
    world: World | None = None
    is_benchmark: bool = False
    benchmark: Benchmark | None = None

    @property
    def is_scenes(self) -> bool:
        """Whether a program can tell what is true about each image."""
        return self.world is not None

    def digest(self) -> str:
        """Returns a hash of all texts and some of the images, which tells data apart."""
        digest = hashlib.sha256()
        step = max(len(self.samples) // _PROBES, 1)
        for index in range(len(self.samples)):
            sample = self.samples[index]
            texts = [sample.id, sample.question, list(sample.references), dict(sample.meta)]
            digest.update(json.dumps(texts, sort_keys=True).encode())
            if index % step == 0:
                image = sample.open_image()
                digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()


_DEFAULT_COUNT = 1000
_CHANGE = 4000  # of random choices; those of worlds are below
_SEED = 0  # the validation and held-out scenes are none of the training's, whatever the seeds


def read_scenes(
    task: str, split: str | None, num_samples: int | None, world: World = WORLDS["scenes"]
) -> EvaluationData:
    """Makes samples of scenes.

    Args:
        task: For `"vqa"`, a sample is a question, of which a scene has five to eight; for `"editing"` a scene with
            words that change it; otherwise a scene.
        split: One of the world's, by default the second, `"validation"`.
        num_samples: How many scenes, by default 1000; more of them begin with the same.
        world: What they are of.

    Raises:
        ValueError: There is no such split.
    """
    split = split or world.splits[1]
    samples = [
        sample
        for index in range(_DEFAULT_COUNT if num_samples is None else num_samples)
        for sample in _read(world, task, split, index)
    ]
    return EvaluationData(world.name, split, samples, world=world)


def _read(world: World, task: str, split: str, index: int) -> list[EvaluationSample]:
    row = world.row(split, _SEED, index)
    scene_id = f"{index:06d}"
    if task == "editing":
        before = world.scene_from_dict(row["scene"])
        text, after, kind = world.change_scene(before, PortableRng(_SEED, index, _CHANGE))
        meta = {"scene": after.to_dict(), "before": before.to_dict(), "kind": kind}
        return [EvaluationSample(scene_id, row["image"], (text,), meta=meta)]
    if task != "vqa":
        return [EvaluationSample(scene_id, row["image"], (row["text"],), meta={"scene": row["scene"]})]
    return [
        EvaluationSample(
            f"{scene_id}-{asked['kind']}",
            row["image"],
            (asked["answer"],),
            question=asked["question"],
            meta={"kind": asked["kind"]},
        )
        for asked in row["questions"]
    ]


class UnfitDataError(ValueError):
    """Data do not have what a task needs."""


class Columns(NamedTuple):
    """Where things are in a dataset; `text` and `answer` may be one text per row, or a list of them."""

    image: str = "image"
    text: str = "text"
    question: str = "question"
    answer: str = "answer"


class TableSamples(Sequence):
    """The rows of a dataset as samples, read when they are asked for.

    Args:
        name: As for `lavit_hf.data.loading.load_data`.
        task: Decides which columns are needed.
        split: Which split.
        columns: Names of the columns.
        image_root: Where relative paths of images start, if not beside the data.
        num_samples: How many rows at most.
        config: Which configuration of a dataset on the Hub.
        revision: Which revision of a dataset on the Hub.

    Raises:
        ImportError: `datasets` is not installed.
        UnfitDataError: There is no such column.
        ValueError: There is no such dataset or split.
    """

    def __init__(
        self,
        name: str,
        task: str,
        split: str,
        columns: Columns,
        image_root: Path | None = None,
        num_samples: int | None = None,
        config: str | None = None,
        revision: str | None = None,
    ) -> None:
        import datasets  # type: ignore[import-untyped]

        dataset, root = load_data(name, split, config, revision)
        self._name = name
        self._root = image_root or root
        self._columns = columns
        self._has_questions = task == "vqa"
        self._has_texts = task != "reconstruction"
        wanted = [columns.image]
        if self._has_texts:
            wanted += [columns.question, columns.answer] if self._has_questions else [columns.text]
        if missing := [column for column in wanted if column not in dataset.column_names]:
            raise UnfitDataError(
                f"{name} has no column {missing[0]!r}; it has {', '.join(map(repr, dataset.column_names))}. See "
                "--image-column, --text-column, --question-column and --answer-column."
            )
        dataset = dataset.select_columns(wanted)
        if isinstance(dataset.features[columns.image], datasets.Image):
            dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
        self._dataset = dataset if num_samples is None else dataset.take(min(num_samples, len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._dataset[index]
        references = row.get(self._columns.answer if self._has_questions else self._columns.text, [])
        references = references if isinstance(references, (list, tuple)) else [references]
        question = row[self._columns.question] if self._has_questions else None
        try:
            if self._has_texts and not references:
                raise ValueError("there is no text.")
            for text in [*references, question] if self._has_questions else references:
                if not isinstance(text, str):
                    raise ValueError(f"expected a text, got {text!r:.60}.")
                check_text(text)
        except ValueError as error:
            raise ValueError(f"{self._name}, row {index}: {error}") from error
        return EvaluationSample(
            f"{index:06d}",
            row[self._columns.image],
            references=tuple(references),
            question=question,
            image_root=self._root,
        )


__all__ = ["Columns", "EvaluationData", "EvaluationSample", "TableSamples", "UnfitDataError"]
