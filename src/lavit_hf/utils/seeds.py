"""Randomness that belongs to a sample, not to the moment at which it is drawn.

Whatever training decides by chance (order of a pair, dropped condition, noise) is a function of the seed, the epoch
and the sample. It does not matter then which process or worker sees the sample, in which batch, or whether the run was
interrupted: a resumed run repeats every decision, and several processes decide as one would.
"""

from __future__ import annotations

import hashlib

_BITS = 63  # the most that a signed integer of 64 bits holds, which is what tensors are made of


def sample_seed(seed: int, epoch: int, sample_id: int, purpose: str) -> int:
    """Mixes everything into a seed; neighboring samples, epochs and purposes get unrelated ones.

    Args:
        seed: The run's seed.
        epoch: Passes over the data so far.
        sample_id: Which sample; any integer that is stable between runs.
        purpose: What is decided by it, such as `"order"`, so that decisions about one sample are independent.

    Returns:
        An integer from 0 to 2**63 - 1, for `torch.Generator.manual_seed` or as an element of a `LongTensor`. It is the
        same on every machine and in every version of Python.
    """
    key = f"{int(seed)}/{int(epoch)}/{int(sample_id)}/{purpose}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)


def sample_uniform(seed: int, epoch: int, sample_id: int, purpose: str) -> float:
    """A number from [0, 1) instead of a seed, for a single decision; arguments as for `sample_seed`."""
    # A float holds 53 bits: dividing all 63 could round up to 1.
    return (sample_seed(seed, epoch, sample_id, purpose) >> (_BITS - 53)) / 2**53
