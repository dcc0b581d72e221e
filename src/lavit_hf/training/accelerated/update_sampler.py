"""Which samples every update of a training run sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ...utils.seeds import sample_seed


class UpdateBatchSampler(Sampler[list[int]]):
    """Batches of one process in one epoch, such that an update sees the same samples however they are divided.

    Update k of an epoch takes samples `[k * n, (k + 1) * n)` of that epoch's order, n = batch size * accumulated
    batches * processes; all updates are of this size, and what is left over at the end of an epoch waits for another
    one. Two processes thus train like one with twice the batch, or with twice as many accumulated batches. accelerate
    shards and skips batches as well, but leaves the epoch behind when it does (see [`EpochCallback`]).

    Args:
        num_samples: Size of the dataset.
        batch_size: Samples per batch and process.
        accumulation: Batches per update and process.
        num_processes: How many processes share an update.
        process_index: Which one this is.
        seed: Seed of the order.

    Raises:
        ValueError: If the dataset is smaller than an update.
    """

    def __init__(
        self, num_samples: int, batch_size: int, accumulation: int, num_processes: int, process_index: int, seed: int
    ) -> None:
        self.num_samples, self.batch_size, self.accumulation = num_samples, batch_size, accumulation
        self.num_processes, self.process_index, self.seed = num_processes, process_index, seed
        self.update_size = batch_size * accumulation * num_processes
        self.updates_per_epoch = num_samples // self.update_size
        self.epoch = self.first_update = 0
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"The dataset has {num_samples} samples, but one update takes {self.update_size} (batch size "
                f"{batch_size} x {accumulation} accumulated x {num_processes} processes). Lower the batch size."
            )

    def start(self, update: int) -> None:
        """Makes the next iteration begin with this update, counted from the beginning of training."""
        self.epoch, self.first_update = divmod(update, self.updates_per_epoch)

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, 0, "order of samples"))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for update in range(self.first_update, self.updates_per_epoch):
            for turn in range(self.accumulation):
                batch = turn * self.num_processes + self.process_index
                first = update * self.update_size + batch * self.batch_size
                yield order[first : first + self.batch_size]


__all__ = ["UpdateBatchSampler"]
