"""Makes sure that the epoch reaches the dataset under plain `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Tells the dataset its epoch before that starts: `Trainer(..., callbacks=[EpochCallback()])`.

    accelerate's `DataLoaderShard.set_epoch` tells the random sampler, and the dataset only if there is no such sampler
    where it looks: with several processes, and in an epoch in which a run is resumed, the dataset learns nothing. It
    learns it here then; telling it twice does no harm.
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
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)


__all__ = ["EpochCallback"]
