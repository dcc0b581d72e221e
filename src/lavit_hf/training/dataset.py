"""Rows of a dataset, as every training stage reads them.

In this order: images, a row and what makes it bad, lengths, `TrainingDataset`, which knows its epoch and outlives bad
rows, and rows of plain datasets, which get the same from a collator and `EpochCallback`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..processing.image_processing_pil_lavit import check_array, load_image, to_rgb
from ..processing.processing_lavit import ImageTextProcessor
from ..processing.tokenization_lavit import IMAGE_TOKEN, check_text
from ..utils.paths import is_inside, resolve_inside
from ..utils.seeds import sample_seed

logger = logging.get_logger(__name__)

_SOURCES = ("image", "path", "url", "base64")  # where a part of a message may have its image, in transformers' chats
_NO_PATHS = ("http://", "https://", "data:")
_COLUMNS = ("images", "image", "codes", "text", "prompt", "messages")
_TARGETS = ("target_images", "target_image")
_BATCH = 1000  # rows whose lengths are measured at once


def read_images(value: Any, root: str | os.PathLike[str] | None = None) -> list[Image.Image]:
    """Decodes the image, or the list of images, of one row: RGB, and upright.

    Args:
        value: `None` (no image), or one image or a list of them: PIL images, arrays or tensors of `uint8`, paths,
            URLs, file contents, or what `datasets.Image(decode=False)` gives, `{"bytes": ..., "path": ...}`.
        root: Where relative paths start. A path that leads out of it is refused: it came from a file. Without a
            root, paths are the caller's own.

    Raises:
        ValueError: If one of them is corrupt, empty, or no image, or if its path leads out of the root.
    """
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [_read_image(image, root) for image in values]


def _read_image(value: Any, root: str | os.PathLike[str] | None) -> Image.Image:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _from_array(value)
    if value is None:
        raise ValueError("the image is missing")
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise ValueError(f"the image is of type {type(value).__name__}")
    if root is not None and not isinstance(value, bytes):
        value = locate_image(os.fspath(value), root)
    return to_rgb(load_image(value))


def locate_image(source: str, root: str | os.PathLike[str]) -> str:
    """A path in the root as a path that can be opened; an URL as it is, and base64 so that it is not taken for a path.

    Raises:
        ValueError: The path leads out of the root.
    """
    if source.startswith(_NO_PATHS):
        return source
    path = Path(root, source)
    is_file = os.path.isfile(path)
    if not is_file and len(source) > 64 and not os.path.splitext(source)[1]:
        return f"data:;base64,{source}"
    datasets = sys.modules.get("datasets")
    if is_file and datasets is not None and is_inside(datasets.config.DOWNLOADED_DATASETS_PATH, path):
        return str(path)  # downloaded, or of an archive that `datasets` unpacked
    return str(resolve_inside(root, source, "the row"))


def _from_array(value: np.ndarray | torch.Tensor) -> Image.Image:
    array = check_array(value)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be of dtype uint8 to be an image, got {array.dtype}")
    array = np.moveaxis(array, 0, -1)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


def read_sample(
    row: Mapping[str, Any], needs_text: bool = True, image_root: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Reads what there is to learn in a row, and makes sure that text and images fit together.

    Args:
        row: A row with `codes`, `images` or `image` (one or a list of them), `text`, `prompt` and `messages`, as far
            as it has them, and with `target_images`. What is read already stays as it is.
        needs_text: Whether images alone will not do.
        image_root: As in `read_images`.

    Returns:
        `images`, and `codes` if the row has them (then there may be no `images`); `text`; and `target_images`,
        `prompt` and `messages` if the row has them.

    Raises:
        ValueError: If it is bad.
    """
    sample: dict[str, Any] = {}
    pictures = row.get("images", row.get("image"))
    if row.get("codes") is not None:
        sample["codes"] = _read_codes(row["codes"])
    if pictures is not None or "codes" not in sample:
        sample["images"] = read_images(pictures, image_root)
    num_images = len(image_contents(sample))
    if row.get("target_images") is not None:
        sample["target_images"] = _read_targets(row["target_images"], num_images, image_root)
    sample["text"] = row.get("text")
    if row.get("prompt") is not None:
        sample["prompt"] = row["prompt"]
    if (messages := read_messages(row)) is not None:
        messages = _ask_about_images(messages, num_images)
        _check_messages(messages, num_images)
        sample["messages"] = [{**one, "content": _read_content(one["content"], image_root)} for one in messages]
    elif needs_text:
        if "text" not in row:
            raise ValueError(
                f"there is no column 'text' or 'messages'; it has {', '.join(sorted(row))}. Those of other names need "
                "`dataset.rename_column`, or a TrainingDataset that is told them"
            )
        check_learned_text(row["text"])
        check_prompt(row.get("prompt"))
        count = f"{row.get('prompt') or ''}{row['text']}".count(IMAGE_TOKEN)
        if count not in (0, num_images):
            raise ValueError(f"it has {num_images} image(s), but its text has {count} {IMAGE_TOKEN} placeholder(s)")
    elif num_images == 0:
        raise ValueError("the image is missing")
    return sample


def _read_targets(value: Any, num_images: int, root: str | os.PathLike[str] | None) -> list[Image.Image]:
    """What stage 1 is to rebuild, one for each image."""
    targets = read_images(value, root)
    if len(targets) != num_images:
        raise ValueError(f"it has {num_images} image(s), but {len(targets)} target image(s)")
    return targets


def _read_content(content: Any, root: str | os.PathLike[str] | None) -> Any:
    """A copy without empty fields, in which the images that a message holds itself are decoded, under `image`."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        part = {name: value for name, value in part.items() if value is not None}
        source = next((part[name] for name in _SOURCES if name in part), None)
        if part["type"] == "image" and source is not None:
            rest = {name: value for name, value in part.items() if name not in _SOURCES}
            part = {**rest, "image": _read_image(source, root)}
        parts.append(part)
    return parts


class ImageContent(NamedTuple):
    """What is known of an image of a row: itself, its codes, or both."""

    image: Any = None
    codes: list[int] | None = None


def image_contents(sample: Mapping[str, Any]) -> list[ImageContent]:
    """What is known of the images of a sample of `read_sample`.

    Raises:
        ValueError: If it has images and codes, but not as many.
    """
    images, codes = sample.get("images"), sample.get("codes")
    if codes is None:
        return [ImageContent(image) for image in images or []]
    if images is None:
        return [ImageContent(codes=of_image) for of_image in codes]
    if len(images) != len(codes):
        raise ValueError(f"it has {len(images)} image(s), but codes of {len(codes)}")
    return [ImageContent(*pair) for pair in zip(images, codes, strict=True)]


def place_images(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a sample of `read_sample`, with every image at its place.

    Parts of type `image` have theirs under `image`, an `ImageContent`: their own, or the sample's in order of
    appearance.
    """
    given = iter(image_contents(sample))
    messages = []
    for message in sample["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {**part, "image": ImageContent(part["image"]) if "image" in part else next(given)}
                if part["type"] == "image"
                else part
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


def check_learned_text(text: Any) -> None:
    """Refuses a text that is missing, blank, or no text."""
    if not isinstance(text, str):
        raise ValueError("the text is missing" if text is None else f"the text is of type {type(text).__name__}")
    if not text.strip():
        raise ValueError("the text is empty")
    check_text(text)


def check_prompt(prompt: Any) -> None:
    """Refuses a prompt that is there but no text."""
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"the prompt is of type {type(prompt).__name__}")
    check_text(prompt)


def read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The chat of a row; `None` if there is none, or one without messages beside other rows with some."""
    messages = row.get("messages")
    if messages is None or (isinstance(messages, (list, tuple)) and not messages):
        return None
    if not isinstance(messages, (list, tuple)) or not all(map(_is_message, messages)):
        raise ValueError(
            "one of its messages lacks a role, or a content that is a text or a list of parts with a type"
        )
    check_text(messages)
    return list(messages)


def _read_codes(value: Any) -> list[list[int]]:
    """The codes of every image of a row."""
    try:
        return [[operator.index(code) for code in codes] for codes in value]
    except TypeError as error:
        raise ValueError(f"its codes are no lists of integers, one per image: {value!r:.60}") from error


def read_sample_id(row: Mapping[str, Any], index: int) -> int:
    """The row's `sample_id`, by default its index."""
    value = row.get("sample_id")
    if value is None:
        return index
    try:
        is_written = isinstance(value, str) or (isinstance(value, float) and value.is_integer())
        return int(value) if is_written else operator.index(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the sample_id {value!r} is no integer: number the samples, or rename the column") from error


def _ask_about_images(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """In a chat of nothing but texts, images come before the first text of the user, as in TRL."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not num_images or not users or not all(isinstance(message["content"], str) for message in messages):
        return messages
    first = messages[users[0]]
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": first["content"]}]
    return [*messages[: users[0]], {**first, "content": content}, *messages[users[0] + 1 :]]


def _check_messages(messages: list[dict[str, Any]], num_images: int) -> None:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("there is nothing to learn: no message is the assistant's")
    if not any(map(_says_something, answers)):
        raise ValueError("there is nothing to learn: all messages of the assistant are empty")
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = [part for part in parts if part["type"] == "image"]
    count = sum(all(part.get(name) is None for name in _SOURCES) for part in images)
    if count != num_images:
        raise ValueError(f"it has {num_images} image(s), but its messages have {count} part(s) that want one")


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    content = message.get("content")
    has_parts = isinstance(content, (list, tuple)) and all(map(_is_part, content))
    return isinstance(message.get("role"), str) and (isinstance(content, str) or has_parts)


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "image" or (part.get("text") or "").strip() for part in content)


def _measure_lengths(dataset: Any, processor: ImageTextProcessor, image_column: str, text_column: str) -> list[int]:
    """Ids of every row as `LavitDataCollator` arranges it, with as many per image as it has patches.

    In the discrete form images are shorter than that, by what the selector drops.
    """
    lengths: list[int] = []
    rows = _texts_and_images(dataset, image_column, text_column)
    while batch := list(itertools.islice(rows, _BATCH)):
        texts, counts = zip(*batch, strict=True)
        ids = processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        per_image = processor.image_seq_length + 2
        lengths += [len(text) + 1 + count * per_image for text, count in zip(ids, counts, strict=True)]
    return lengths


def _texts_and_images(dataset: Any, image_column: str, text_column: str) -> Iterator[tuple[str, int]]:
    """The text of every row, and its number of images."""
    if not hasattr(dataset, "iter") or is_transformed(dataset):  # the latter makes rows of its own, images included
        for row in dataset:
            images = row.get(image_column)
            count = len(images) if isinstance(images, (list, tuple)) else int(images is not None)
            yield _text(row, text_column), count
        return
    # As arrow tables, image files stay where they are: on the disk.
    names = [name for name in (text_column, "prompt", "messages") if name in dataset.column_names]
    for table in dataset.with_format("arrow").iter(_BATCH):
        has_images = image_column in table.column_names
        counts = _arrow_counts(table[image_column]) if has_images else [0] * len(table)
        for row, count in zip(table.select(names).to_pylist(), counts, strict=True):
            yield _text(row, text_column), count


def _arrow_counts(column: Any) -> list[int]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.compute  # type: ignore[import-untyped]

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        return [count or 0 for count in pyarrow.compute.list_value_length(column).to_pylist()]
    return [int(is_there) for is_there in column.is_valid().to_pylist()]


def _text(row: Mapping[str, Any], text_column: str) -> str:
    pieces = [row.get("prompt") or "", row.get(text_column) or ""]
    try:
        messages = read_messages(row) or []
        for piece in pieces:
            check_prompt(piece)
    except ValueError:
        return ""  # a bad sample, which says so when it is read
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        pieces.extend(part.get("text") or "" for part in parts)
    return " ".join(filter(None, pieces))


class FollowsEpoch:
    """What `EpochCallback` tells the epoch of its samples, or of rows that do not carry it themselves."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by worker processes

    @property
    def epoch(self) -> int:
        """The epoch of what is given out, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Makes it this epoch from now on, in running workers, too."""
        self._epoch.fill_(epoch)


class TrainingDataset(FollowsEpoch, Dataset):
    """Samples of a `datasets.Dataset` (or of a list of dictionaries), ready for the collators of this package.

    A sample is `{"images": [RGB images], "text": str or None, "sample_id": int, "epoch": int}`. Rows that were
    tokenized before have `"codes"` (a list of codes per image) instead of `"images"`, or beside them; `"prompt"` and
    `"messages"` are handed on if the dataset has such columns. `sample_id` is the row's index, or its column of this
    name. With a `target_image_column`, stage 1 finds `"target_images"` there.

    A sample is bad if an image cannot be decoded (of the column or of a message), if its text, or all that the
    assistant says, is missing or blank, or if the `<image>` placeholders in its text are not as many as its images.
    With `on_bad_sample="skip"` it is logged with its index, counted, and replaced by the next good one, the same in
    every run.

    With plain `Trainer`, add [`EpochCallback`] to the callbacks: accelerate calls `set_epoch` of a dataset in some
    situations only (not with several processes, nor in the epoch in which a run is resumed). A training loop of your
    own calls it before every epoch. Workers see the new epoch, persistent ones included.

    Args:
        dataset: A `datasets.Dataset`, or a sequence of dictionaries. Images need not be decoded before.
        image_column: Where the images are: one, or a list of them, or `None` for a row of text alone.
        text_column: Where the text is; `None` for images without text.
        on_bad_sample: `"skip"`, or `"raise"` to stop at the first one.
        lengths: Length of every row in ids, for `train_sampling_strategy="group_by_length"`; by default those of the
            dataset's column `length`, if it has one. `measure_lengths` finds them out.
        image_root: Where relative paths of images start, and what no path may leave: one that does makes a bad sample.
            By default the working directory, and paths are taken for the caller's own.
        target_image_column: Where what stage 1 is to rebuild is, one for each image; by default the images themselves.

    Raises:
        TypeError: If the dataset has no length, as a streamed one.
        ValueError: If it is empty or lacks a column.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        text_column: str | None = "text",
        on_bad_sample: str = "skip",
        lengths: Sequence[int] | None = None,
        image_root: str | os.PathLike[str] | None = None,
        target_image_column: str | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"TrainingDataset needs a dataset with a length, got {type(dataset).__name__}. For a streamed dataset "
                "there is StreamedTrainingDataset, or hand it to Trainer itself: the collators number its rows."
            )
        if len(dataset) == 0:
            raise ValueError("The dataset is empty.")
        if on_bad_sample not in ("skip", "raise"):
            raise ValueError(f"`on_bad_sample` must be 'skip' or 'raise', got {on_bad_sample!r}.")
        names = column_names(dataset)
        self.image_column = find_columns(names, image_column, text_column)
        if target_image_column is not None and target_image_column not in names:
            raise ValueError(
                f"The dataset has no column {target_image_column!r} for `target_image_column`; it has {names}."
            )
        self.text_column = text_column
        self.target_image_column = target_image_column
        self.on_bad_sample = on_bad_sample
        self.image_root = image_root
        wanted = {self.image_column, "codes", text_column, "prompt", "messages", "sample_id", "length"}
        wanted.add(target_image_column)
        self.dataset = leave_undecoded(dataset, [name for name in names if name in wanted])
        self._lengths = _row_lengths(dataset, lengths, names)
        self._is_bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # filled by worker processes

    @property
    def bad_samples(self) -> list[int]:
        """Indices of the bad samples met so far, by this process and its workers."""
        return self._is_bad.nonzero().flatten().tolist()

    @property
    def num_bad_samples(self) -> int:
        """How many these are."""
        return len(self.bad_samples)

    @property
    def has_lengths(self) -> bool:
        """Whether the length of every row is known, given or measured."""
        return self._lengths is not None

    def measure_lengths(self, processor: ImageTextProcessor) -> TrainingDataset:
        """Counts the ids of every row, which `train_sampling_strategy="group_by_length"` needs; decodes no image.

        Lengths that are known already stay: `lavit tokenize` has counted the codes of every image.

        Returns:
            Itself.
        """
        if not self.has_lengths:
            self._lengths = _measure_lengths(self.dataset, processor, self.image_column, self.text_column or "text")
        return self

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            IndexError: If there is no such row.
            ValueError: If the sample is bad and `on_bad_sample="raise"`, or if all samples are bad.
        """
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for a dataset of {size} samples")
        for step in range(size):
            position = (index + step) % size
            try:
                return self._read(self.dataset[position], position)
            except ValueError as error:
                self._report(position, error)
        raise ValueError(f"All {size} samples of the dataset are bad; the warnings say why.")

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """All samples in order, each read when it is looked at; the length alone is known without."""
        return (_LazySample(self, index) for index in range(len(self)))

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        named = name_columns(row, self.image_column, self.text_column)
        if self.target_image_column is not None:
            target = row.get(self.target_image_column)
            named["target_images"] = [] if target is None else target
        sample = read_sample(named, needs_text=self.text_column is not None, image_root=self.image_root)
        sample["sample_id"] = read_sample_id(row, index)
        sample["epoch"] = self.epoch
        if self._lengths is not None:
            sample["input_ids"] = range(self._lengths[index])
        return sample

    def _report(self, index: int, error: ValueError) -> None:
        if self.on_bad_sample == "raise":
            raise ValueError(f"Sample {index} of the dataset is bad: {error}") from error
        if not self._is_bad[index]:
            self._is_bad[index] = True
            logger.warning(f"Sample {index} of the dataset is bad and is replaced by the next good one: {error}")


class _LazySample(Mapping):
    """A sample that is read on first need, so that `Trainer` can ask for all lengths without decoding an image."""

    def __init__(self, dataset: TrainingDataset, index: int) -> None:
        self._dataset, self._index = dataset, index
        self._sample: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        lengths = self._dataset._lengths
        if name == "input_ids" and lengths is not None:
            return range(lengths[self._index])
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, Any]:
        if self._sample is None:
            self._sample = self._dataset[self._index]
        return self._sample


def find_columns(names: Sequence[str], image_column: str, text_column: str | None) -> str:
    """The column of the images: as named, or `codes` in its place.

    Raises:
        ValueError: If there is nothing to learn from in these columns.
    """
    image_column = "codes" if "codes" in names and image_column not in names else image_column
    if text_column is not None and text_column not in names and "messages" not in names:
        raise ValueError(f"The dataset has no column {text_column!r} for `text_column`; it has {list(names)}.")
    if text_column is None and image_column not in names:
        raise ValueError(f"The dataset has no column {image_column!r} for `image_column`; it has {list(names)}.")
    return image_column


def name_columns(row: Mapping[str, Any], image_column: str, text_column: str | None) -> dict[str, Any]:
    """The columns of a row by the names that `read_sample` knows."""
    return {
        "images": None if image_column == "codes" else row.get(image_column),
        "codes": row.get("codes"),
        "text": None if text_column is None else row.get(text_column),
        "prompt": row.get("prompt"),
        "messages": row.get("messages"),
    }


def first_row(dataset: Any) -> dict[str, Any]:
    """The first row of a dataset, or of a stream.

    Raises:
        ValueError: If there is none.
    """
    for row in dataset:
        return row
    raise ValueError("The dataset is empty.")


def column_names(dataset: Any) -> list[str]:
    """The columns of rows as a dataset gives them: after the user's transform, if it has one."""
    names = None if is_transformed(dataset) else getattr(dataset, "column_names", None)
    return list(names or first_row(dataset))


def leave_undecoded(dataset: Any, columns: Sequence[str]) -> Any:
    """A `datasets.Dataset` or `IterableDataset` of these columns, which leaves images to us to decode.

    There a corrupt one is caught. A dataset with a transform stays as it is: the user's own decides what a row is.
    """
    if not hasattr(dataset, "cast_column") or is_transformed(dataset):
        return dataset
    import datasets  # type: ignore[import-untyped]

    dataset = dataset.with_format(None).select_columns(list(columns))
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return dataset


def is_transformed(dataset: Any) -> bool:
    """Whether rows of a `datasets.Dataset` are what a function of the user makes of them."""
    return getattr(dataset, "format", {}).get("type") == "custom"


def _row_lengths(dataset: Any, lengths: Sequence[int] | None, names: list[str]) -> list[int] | None:
    if lengths is None and "length" in names:
        lengths = dataset["length"] if hasattr(dataset, "column_names") else [row["length"] for row in dataset]
        if not all(isinstance(length, (int, np.integer)) for length in lengths):
            return None  # a column of the user's, of something else
    if lengths is None:
        return None
    if len(lengths) != len(dataset):
        raise ValueError(f"Got {len(lengths)} lengths for {len(dataset)} rows.")
    return [int(length) for length in lengths]


def complete_row(row: Mapping[str, Any], epoch: int = 0, needs_text: bool = False) -> dict[str, Any]:
    """A row as `TrainingDataset` would give it out; what it has already stays.

    Args:
        row: A row with the columns that `read_sample` knows.
        epoch: The epoch, if the row does not say.
        needs_text: Whether it is for the language model. The other stages learn from its images alone, whatever else
            there is, and find its other columns as they are.

    Raises:
        ValueError: If the row has nothing to learn from, or is bad.
    """
    if not set(_COLUMNS) - {"prompt"} & set(row):
        raise ValueError(
            f"A row has nothing but {sorted(row)}: neither images nor text. Trainer removes columns that are no "
            "inputs of the model before they get here: set `remove_unused_columns=False` in TrainingArguments. "
            "Columns of other names than `image`, `text` or `messages` need `dataset.rename_column`, or a "
            "TrainingDataset that is told their names."
        )
    sample_id = number_row(row) if row.get("sample_id") is None else read_sample_id(row, 0)
    try:
        if needs_text:
            sample = read_sample(row)
        else:
            sample = {**row, "images": read_images(row.get("images", row.get("image")))}
            targets = next((row[name] for name in _TARGETS if row.get(name) is not None), None)
            if targets is not None:
                sample["target_images"] = _read_targets(targets, len(sample["images"]), None)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"Sample {sample_id} is bad: {reason}. TrainingDataset skips such samples.") from error
    return {**sample, "sample_id": sample_id, "epoch": epoch if row.get("epoch") is None else int(row["epoch"])}


def number_row(row: Mapping[str, Any]) -> int:
    """A number from 0 to 2**63 - 1 made from the content of a row.

    It is the same in every epoch, process, worker and run, whatever the order of the rows. Rows of the same content
    share it.
    """
    content = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    text = json.dumps(content, default=_digest, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _digest(value: Any) -> str:
    """A digest in the place of a value that JSON cannot hold."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {_digest(value.tobytes())}"
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.asarray(value)
        return f"{array.dtype} {array.shape} {_digest(array.tobytes())}"
    return hashlib.blake2b(value if isinstance(value, bytes) else str(value).encode(), digest_size=16).hexdigest()


class EpochCallback(TrainerCallback):
    """Tells dataset, collator and sampler the epoch before it starts: `Trainer(..., callbacks=[EpochCallback()])`.

    accelerate's `DataLoaderShard.set_epoch` tells the random sampler, and the dataset only if there is no such sampler
    where it looks: with several processes, and in an epoch in which a run is resumed, the dataset learns nothing. It
    learns it here then; telling it twice does no harm.

    The sampler of `train_sampling_strategy="group_by_length"` knows no epochs: it draws from the global random state,
    which a resumed run does not have. Here it gets a generator of its own, seeded by seed and epoch; and it gives any
    number of processes the same updates.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Counted, because an epoch that was stopped early leaves a fraction in `state.epoch`.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        data_loader = kwargs.get("train_dataloader")
        sampler = _find_sampler(data_loader)
        # The collator is asked for rows of a dataset that knows no epochs.
        for part in (getattr(data_loader, "dataset", None), getattr(data_loader, "collate_fn", None), sampler):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        if isinstance(sampler, LengthGroupedSampler):
            seed = args.seed if args.data_seed is None else args.data_seed
            # Rows of like lengths are sought among as many as this is times 50: it must not be that of one process.
            sampler.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            sampler.generator = torch.Generator().manual_seed(sample_seed(seed, self._epoch, 0, "sampler"))


def _find_sampler(data_loader: Any) -> Any:
    """The sampler at the bottom of the batch samplers that accelerate wraps around one another."""
    batch_sampler = getattr(data_loader, "batch_sampler", None)
    while batch_sampler is not None and hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    return getattr(batch_sampler, "sampler", None)
