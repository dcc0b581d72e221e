import pytest
import torch

from lavit_hf.utils.seeds import sample_seed, sample_uniform


def test_a_seed_never_changes():
    """Checkpoints of older versions resume with the decisions that they were trained with."""
    assert sample_seed(0, 0, 0, "order") == 7974488310415135419
    assert sample_seed(42, 3, 12345, "noise") == 3941658397265169999


@pytest.mark.parametrize("other", [(1, 0, 7, "order"), (0, 1, 7, "order"), (0, 0, 8, "order"), (0, 0, 7, "noise")])
def test_every_argument_matters(other):
    assert sample_seed(*other) != sample_seed(0, 0, 7, "order")


def test_arguments_do_not_run_together():
    assert sample_seed(1, 11, 1, "x") != sample_seed(11, 1, 1, "x") != sample_seed(1, 1, 11, "x")


def test_seeds_fit_a_tensor_and_a_generator():
    seeds = [sample_seed(0, 0, index, "noise") for index in range(1000)]
    assert torch.tensor(seeds).tolist() == seeds
    assert min(seeds) >= 0 and max(seeds) > 2**62
    assert len(set(seeds)) == 1000
    torch.Generator().manual_seed(max(seeds))


def test_uniform_numbers_are_uniform():
    values = torch.tensor([sample_uniform(0, epoch, index, "order") for epoch in range(4) for index in range(2500)])
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert (counts - 1000).abs().max() < 120, "four standard deviations"
    by_epoch = values.view(4, -1)
    assert torch.corrcoef(by_epoch).fill_diagonal_(0).abs().max() < 0.08
