"""Fingerprints of weights."""

import copy

import torch
from torch import nn

from lavit_hf.utils.fingerprints import module_fingerprint


def test_every_weight_and_its_dtype_count():
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    found = module_fingerprint(first, second)
    assert found == module_fingerprint(copy.deepcopy(first), copy.deepcopy(second))
    assert found != module_fingerprint(second, first) and found != module_fingerprint(first)
    assert found != module_fingerprint(copy.deepcopy(first).double(), second)
    other = copy.deepcopy(second)
    other[1].running_mean[0] += 1e-6  # buffers, too
    assert found != module_fingerprint(first, other)
    with torch.no_grad():
        first.bias[1] += 1e-6
    assert found != module_fingerprint(first, second)
