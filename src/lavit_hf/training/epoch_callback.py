"""Makes sure that the epoch reaches everything that depends on it under plain `Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..utils.seeds import sample_seed


class EpochCallback(TrainerCallback):
    """Tells dataset, collator and sampler the epoch before it starts: `Trainer(..., callbacks=[EpochCallback()])`.

    accelerate's `DataLoaderShard.set_epoch` tells the random sampler, and the dataset only if there is no such sampler
    where it looks: with several processes, and in an epoch in which a run is resumed, the dataset learns nothing. It
    learns it here then; telling it twice does no harm.

    The sampler of `train_sampling_strategy="group_by_length"` knows no epochs: it draws from the global random state,
    which a resumed run does not have. Here it gets a generator of its own, seeded by seed and epoch.
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
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        if isinstance(sampler, LengthGroupedSampler):
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler.generator = torch.Generator().manual_seed(sample_seed(seed, self._epoch, 0, "sampler"))


def _find_sampler(data_loader: Any) -> Any:
    """The sampler at the bottom of the batch samplers that accelerate wraps around one another."""
    batch_sampler = getattr(data_loader, "batch_sampler", None)
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    return getattr(batch_sampler, "sampler", None)


__all__ = ["EpochCallback"]
