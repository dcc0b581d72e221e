"""Rows of a dataset to rows of codes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...modeling.modeling_lavit_visual_tokenizer import move_pixels
from ...processing.processing_lavit import ImageTextProcessor
from ...processing.tokenization_lavit import check_text
from ..dataset import check_learned_text, check_prompt, read_images, read_messages, read_sample_id
from .directory import TokenizationReport

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass
class PreparedRow:
    """A row whose images are decoded, or that is bad.

    Attributes:
        sample_id: Which one.
        values: The columns that are kept.
        pixel_values: What the visual tokenizer takes, `[images, channels, height, width]`; `None` without images.
        error: What is wrong with it, if something is.
        codes: Those of every image, once they are known.
    """

    sample_id: int
    values: dict[str, Any]
    pixel_values: torch.Tensor | None = None
    error: ValueError | None = None
    codes: list[list[int]] = field(default_factory=list)


@dataclass
class RowTokenizer:
    """Turns rows into codes, text and lengths.

    Attributes:
        processor: With its visual tokenizer.
        image_column: Where the images are.
        text_column: Where the text is, or `None`.
        kept: Names of columns that are kept, with what `datasets` knows about each.
        batch_size: Images that are encoded at a time.
        image_root: Where relative paths of images start.
        on_bad_sample: `"skip"` or `"raise"`.
        num_image_tokens: How many codes each image becomes; by default as many as the selector chooses.
    """

    processor: ImageTextProcessor
    image_column: str
    text_column: str | None
    kept: Mapping[str, Any]
    batch_size: int
    image_root: Path | None
    on_bad_sample: str
    num_image_tokens: int | None = None

    def tokenize(
        self, rows: Iterable[tuple[int, Mapping[str, Any]]], executor: Executor, on_row: Callable[[], object]
    ) -> tuple[list[dict[str, Any]], TokenizationReport]:
        """
        Args:
            rows: Sample ids and rows; `sample_id` of a row, if there is one, counts instead.
            executor: Decodes images ahead.
            on_row: Called after every row.

        Returns:
            The rows to write, in order, and what became of all.

        Raises:
            ValueError: A sample is bad, and that is not to be skipped.
        """
        report = TokenizationReport(Path())
        good: list[PreparedRow] = []
        waiting: list[tuple[PreparedRow, torch.Tensor]] = []
        for row in ahead_of(self._prepare, rows, executor, 2 * self.batch_size):
            report.num_samples += 1
            on_row()
            if row.error is not None:
                if self.on_bad_sample == "raise":
                    raise ValueError(f"Sample {row.sample_id} of the dataset is bad: {row.error}") from row.error
                report.bad_samples.append((row.sample_id, str(row.error)))
                continue
            good.append(row)
            if row.pixel_values is not None:
                waiting += [(row, pixels) for pixels in row.pixel_values]
                row.pixel_values = None  # or a whole shard of them would stay in memory
            while len(waiting) >= self.batch_size:
                self._encode(waiting[: self.batch_size])
                del waiting[: self.batch_size]
        self._encode(waiting)
        report.num_rows = len(good)
        report.num_images = sum(len(row.codes) for row in good)
        report.num_codes = sum(len(codes) for row in good for codes in row.codes)
        return self._finish(good), report

    def _prepare(self, numbered: tuple[int, Mapping[str, Any]]) -> PreparedRow:
        index, row = numbered
        sample_id = read_sample_id(row, index)
        values = {name: row[name] for name in self.kept}
        prepared = PreparedRow(sample_id, values)
        try:
            has_messages = read_messages(row) is not None
            check_prompt(row.get("prompt"))
            for name, value in values.items():
                _check_kept(name, value, self.kept[name])
            if self.text_column is not None:
                values["text"] = text = row[self.text_column]
                if not has_messages or (text is not None and str(text).strip()):
                    check_learned_text(text)
            images = read_images(row[self.image_column], self.image_root)
            if images:
                inputs = self.processor.image_processor(images, return_tensors="pt")
                prepared.pixel_values = inputs["pixel_values"]
            elif self.text_column is None and not has_messages:
                raise ValueError("the image is missing")
        except ValueError as error:
            prepared.error = error
        return prepared

    @torch.inference_mode()
    def _encode(self, waiting: list[tuple[PreparedRow, torch.Tensor]]) -> None:
        if not waiting:
            return
        visual_tokenizer = self.processor.get_visual_tokenizer()
        pixel_values = torch.stack([pixels for _, pixels in waiting])
        output = visual_tokenizer.encode(move_pixels(pixel_values, visual_tokenizer), num_tokens=self.num_image_tokens)
        codes = output.codes.tolist()
        start = 0
        for (row, _), count in zip(waiting, output.num_tokens.tolist(), strict=True):
            row.codes.append(codes[start : start + count])
            start += count

    def _finish(self, rows: list[PreparedRow]) -> list[dict[str, Any]]:
        """Adds the lengths: codes, two ids more per image, and those of the text."""
        pieces = [self._text_pieces(row.values) for row in rows]
        flat = [piece for row_pieces in pieces for piece in row_pieces]
        encoded = iter(self.processor.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        finished = []
        for row, row_pieces in zip(rows, pieces, strict=True):
            length = sum(len(codes) + 2 for codes in row.codes) + sum(len(next(encoded)) for _ in row_pieces)
            finished.append({"codes": row.codes, **row.values, "length": length, "sample_id": row.sample_id})
        return finished

    def _text_pieces(self, values: Mapping[str, Any]) -> list[str]:
        """All text of a row; what is between images is tokenized as if it stood alone."""
        texts = [values.get("prompt"), values.get("text")]
        for message in values.get("messages") or []:
            content = message["content"]
            texts += [content] if isinstance(content, str) else [part.get("text") for part in content]
        return [piece for text in texts if text for piece in text.split(self.processor.image_token) if piece]


def _check_kept(name: str, value: Any, feature: Any) -> None:
    """Refuses what the column cannot hold as it is: `datasets` would change it, or fail while it writes."""
    import datasets  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

    check_text(value)
    if not isinstance(feature, datasets.Value):
        return
    try:
        stored = pyarrow.scalar(value, feature.pa_type).as_py()
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"{name} is {value!r:.60}, but the column is of type {feature.dtype}") from error
    if pyarrow.types.is_integer(feature.pa_type) and stored != value:
        raise ValueError(f"{name} is {value!r}, but the column holds integers")


def ahead_of(function: Callable[[_In], _Out], items: Iterable[_In], executor: Executor, ahead: int) -> Iterator[_Out]:
    """Like `executor.map`, but no more than `ahead` items are read and in memory before they are needed."""
    running: deque[Future[_Out]] = deque()
    for item in items:
        running.append(executor.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
