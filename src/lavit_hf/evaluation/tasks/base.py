"""What all tasks have in common."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from ...utils.seeds import sample_seed
from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement
from ..metrics import load_metric

Record = Mapping[str, Any]
"""A line of `predictions.jsonl`: the sample's texts, and what the model made of it."""


@dataclass
class Prediction:
    """What the model made of a sample.

    Attributes:
        values: As JSON.
        picture: What was drawn, if something was.
    """

    values: dict[str, Any]
    picture: Image.Image | None = None


@dataclass
class Shown:
    """How a sample looks on the page of samples.

    Attributes:
        pictures: Each with a title.
        lines: Texts, each with a title.
        is_right: Whether all of it is right; `None` if that cannot be told.
    """

    pictures: list[tuple[str, Image.Image]]
    lines: list[tuple[str, str]] = field(default_factory=list)
    is_right: bool | None = None


class Task(ABC):
    """Something that a checkpoint is asked to do with every sample, and how that is scored.

    Args:
        data: What it is asked about.
        options: What the user set, by name; the rest is the task's own choice. Unknown ones are refused.
        seed: Of everything random.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = False
    scoring_options: ClassVar[tuple[str, ...]] = ()
    """Options that predictions do not depend on."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options for which checkpoints may have values of their own."""

    def __init__(
        self,
        data: EvaluationData,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.seed = seed
        self.options = self.default_options(data)
        self._given = {name: value for name, value in (options or {}).items() if value is not None}
        for name in options or ():
            if name not in self.options:
                raise ValueError(f"The task {self.name} has no option {name!r}; it has {', '.join(self.options)}.")
        self.options.update(self._given)

    @classmethod
    @abstractmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        """All options, as the release has them, or as the data needs them."""

    def follow(self, generation_config: Any) -> None:
        """Takes what the user did not say from a checkpoint's generation config; of own data, as `lavit ask` does."""
        if self.data.is_scenes or self.data.is_benchmark:
            return
        own = {name: getattr(generation_config, name, None) for name in self.own_options}
        own = {name: value for name, value in own.items() if value is not None}
        self.options = {**self.default_options(self.data), **own, **self._given}

    @abstractmethod
    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        """Asks the model. What it says of a sample must not depend on the others."""

    @abstractmethod
    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        """Scores all predictions.

        Args:
            checkpoint: Who made them.
            records: In the order of the data.
            folder: Where the paths in records start.
        """

    @abstractmethod
    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        """Shows one sample to people."""

    def metric_options(self) -> dict[str, dict[str, Any]]:
        """Which metrics of `lavit_hf.evaluation.metrics` score predictions, and how these are loaded."""
        return {}

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """The metrics by name, loaded when first asked for."""
        return {name: load_metric(name, **options) for name, options in self.metric_options().items()}

    def settings(self) -> dict[str, Any]:
        """What predictions depend on, beside checkpoint and data."""
        options = {name: value for name, value in self.options.items() if name not in self.scoring_options}
        return {"task": self.name, "seed": self.seed, "options": options}

    def generator(self, sample: EvaluationSample, purpose: str, number: int = 0) -> torch.Generator:
        """A source of randomness that belongs to a sample, whatever is drawn before it or beside it."""
        seed = sample_seed(self.seed, number, 0, f"{sample.id}/{purpose}")
        return torch.Generator().manual_seed(seed)


__all__ = ["Prediction", "Record", "Shown", "Task"]
