"""Any dataset of Hugging Face `datasets` that has a column of images, and one of texts or of questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.loading import load_data
from ...processing.tokenization_lavit import check_text
from .sample import EvaluationSample


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
        columns: Their names.
        image_root: Where relative paths of images start, if not beside the data.
        num_samples: How many rows at most.
        config: Which configuration of a dataset on the Hub.
        revision: Which revision of a dataset on the Hub.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: There is no such dataset, split, or column.
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
            raise ValueError(
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


__all__ = ["Columns", "TableSamples"]
