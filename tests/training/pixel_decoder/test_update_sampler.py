"""Every update sees the same samples, however many processes share it."""

from collections.abc import Iterable
from itertools import chain

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from lavit_hf.training.pixel_decoder.trainer import UpdateSampler


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def updates(
    batch_size: int, accumulation: int, processes: int, start: int = 0, num_samples: int = 30
) -> list[set[int]]:
    """Samples of every update from one on, to the end of its epoch, as accelerate divides and skips batches."""
    update_size = batch_size * accumulation * processes
    sampler = UpdateSampler(num_samples, update_size, seed=3)
    epoch, first = divmod(start, num_samples // update_size)
    sampler.set_epoch(epoch)
    parts = []
    for index in range(processes):
        loader = DataLoader(range(num_samples), batch_size=batch_size, sampler=sampler)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=index)
        loader = skip_first_batches(loader, first * accumulation)
        loader.set_epoch(epoch)  # as `Trainer` does
        batches = [batch.tolist() for batch in loader]
        assert len(batches) == len(loader) and all(len(batch) == batch_size for batch in batches)
        parts.append([flat(batches[at : at + accumulation]) for at in range(0, len(batches), accumulation)])
    joined = [flat(shares) for shares in zip(*parts, strict=True)]
    assert all(len(set(update)) == len(update) for update in joined)
    return [set(update) for update in joined]


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_updates_do_not_depend_on_how_they_are_divided(batch_size, accumulation, processes):
    whole = updates(8, 1, 1)
    assert updates(batch_size, accumulation, processes) == whole and len(whole) == 3
    assert sum(map(len, whole)) == len(set.union(*whole)) == 24


def test_a_resumed_run_sees_what_is_left():
    first, second = updates(8, 1, 1), updates(8, 1, 1, start=3)
    assert updates(8, 1, 1, start=1) == first[1:]
    assert updates(2, 2, 2, start=5) == second[2:]
    assert first != second and len(second) == 3


def test_the_order_is_random_and_reproducible():
    def order(seed: int) -> list[int]:
        return list(UpdateSampler(30, 10, seed))

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(30)) != order(0)


def test_a_dataset_smaller_than_an_update():
    with pytest.raises(ValueError, match="has 7 samples, but one update takes 8 .batch size x accumulated batches x"):
        UpdateSampler(7, 8, seed=0)
