"""Parts of a sample as one row of ids, cut to a length without harming an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

IGNORED = -100  # what a loss of transformers skips


@dataclass
class Run:
    """Consecutive ids of one text or one image.

    Attributes:
        ids: The ids.
        is_learned: A mark at every id that is learned.
        is_image: Whether it is an image, which is never cut.
    """

    ids: list[int]
    is_learned: list[bool]
    is_image: bool = False

    def drop_unlearned(self, count: int) -> int:
        """Removes the first ids that are not learned, at most `count`; returns how many."""
        dropped = [position for position, is_learned in enumerate(self.is_learned) if not is_learned][: max(count, 0)]
        for position in reversed(dropped):
            del self.ids[position], self.is_learned[position]
        return len(dropped)

    def drop_last(self, count: int) -> int:
        """Removes the last ids, at most `count`; returns how many."""
        dropped = min(max(count, 0), len(self.ids))
        kept = len(self.ids) - dropped
        del self.ids[kept:], self.is_learned[kept:]
        return dropped


@dataclass
class TrainingRow:
    """The ids of a sample.

    Attributes:
        sample_id: The sample, for messages.
        runs: Its text and images.
        pixel_values: Its continuous images in order, `[channels, height, width]` each.
    """

    sample_id: int
    runs: list[Run] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(run.ids) for run in self.runs)

    @property
    def ids(self) -> list[int]:
        """All ids, `[length]`."""
        return [index for run in self.runs for index in run.ids]

    @property
    def labels(self) -> list[int]:
        """What is to be predicted, `[length]`: nothing before the first id could predict that one."""
        labels = [
            index if is_learned else IGNORED
            for run in self.runs
            for index, is_learned in zip(run.ids, run.is_learned, strict=True)
        ]
        return [IGNORED, *labels[1:]]

    def add(self, ids: Sequence[int], is_learned: bool | Sequence[bool], is_image: bool = False) -> None:
        """Appends ids, with one mark for all of them or one each."""
        marks = [is_learned] * len(ids) if isinstance(is_learned, bool) else list(is_learned)
        self.runs.append(Run(list(ids), marks, is_image))

    def end(self, eos_token_id: int) -> None:
        """Appends the end of text if what comes before is learned, so that the model learns to stop there.

        A chat template may have written the end already.
        """
        last = next((run for run in reversed(self.runs) if run.ids), None)
        if last is None:
            return
        if last.ids[-1] == eos_token_id:
            last.is_learned[-1] = True
        elif last.is_learned[-1]:
            self.add([eos_token_id], True)

    def truncate(self, max_length: int) -> None:
        """Cuts text until the row is short enough: first that of prompts, from its start; then the end of the rest.

        Raises:
            ValueError: If images leave no room for anything to learn.
        """
        excess = len(self) - max_length
        texts = [run for run in self.runs if not run.is_image]
        for run in texts:
            excess -= run.drop_unlearned(excess)
        for run in reversed(texts):
            excess -= run.drop_last(excess)
        if excess > 0 or not any(any(run.is_learned) for run in self.runs):
            length = sum(len(run.ids) for run in self.runs if run.is_image)
            raise ValueError(
                f"The images of sample {self.sample_id} take {length} tokens and cannot be cut, which leaves nothing "
                f"to learn within `max_length={max_length}`. Raise it, or leave the sample out."
            )


__all__ = ["IGNORED", "Run", "TrainingRow"]
