"""k-means on the unit sphere, reproducible from its seed."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_CHUNK = 4096  # tokens whose distances to all centers are held at once


def nearest_rows(tokens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest row `[tokens]`, and the squared distance to it `[tokens]`, for tokens of length 1."""
    indices, distances = [], []
    for chunk in tokens.split(_CHUNK):
        distance = 1 + rows.square().sum(dim=-1) - 2 * chunk @ rows.T
        smallest, index = distance.min(dim=-1)
        indices.append(index)
        distances.append(smallest.clamp_min(0))
    return torch.cat(indices), torch.cat(distances)


def sum_by_code(tokens: torch.Tensor, codes: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of tokens of every code `[num_codes]` and their sum `[num_codes, width]`."""
    counts = torch.bincount(codes, minlength=num_codes).to(tokens.dtype)
    return counts, tokens.new_zeros(num_codes, tokens.shape[1]).index_add_(0, codes, tokens)


@torch.no_grad()
def spherical_kmeans(
    tokens: torch.Tensor, num_centers: int, num_iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds centers of length 1 for tokens of length 1.

    A center that loses all its tokens moves to the token that is worst represented, so that many equal tokens (flat
    backgrounds) do not leave centers unused.

    Args:
        tokens: `[tokens, width]`, fp32, at least one.
        num_centers: How many centers to find.
        num_iterations: Rounds of assigning and averaging.
        generator: Picks the tokens to start from; a CPU generator, so that the choice is the same on every device.

    Returns:
        Centers `[num_centers, width]` and how many tokens each has, `[num_centers]`.
    """
    order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
    centers = tokens[order.repeat(-(-num_centers // len(tokens)))[:num_centers]]
    counts = tokens.new_zeros(num_centers)
    for _ in range(num_iterations):
        codes, distances = nearest_rows(tokens, centers)
        counts, sums = sum_by_code(tokens, codes, num_centers)
        centers = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), centers)
        empty = (counts == 0).nonzero().flatten()
        farthest = distances.topk(min(len(empty), len(tokens))).indices
        centers[empty[: len(farthest)]] = tokens[farthest]
    return centers, counts
