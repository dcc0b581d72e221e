"""How the codebook learns: k-means for a start, moving averages, revival of codes that nothing uses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..utils.distributed import gather_rows, sum_over_processes, take_from_first_process
from .configuration_lavit import LavitPreTrainingConfig

_CHUNK = 4096  # tokens whose distances to all centers are held at once
_REPRESENTED = 1e-6  # squared distance to its row below which a token needs no row of its own


class LavitCodebookLearner(nn.Module):
    """What the codebook's training needs beside the codebook itself, as buffers that are saved with the model.

    vector-quantize-pytorch does much the same. It draws starting points and revived codes from the global generator,
    so that several processes would not equal one and a resumed run would depend on what else was drawn; and it keeps
    a codebook of its own, while here the one of [`LavitQuantizer`] learns.

    Rows have length 1, like the tokens that are looked up in them. Statistics are summed over all processes, and
    whatever is decided by chance follows from `config.seed` and the step: all processes hold the same codebook.
    """

    is_initialized: torch.Tensor
    quantized_steps: torch.Tensor
    num_revived: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    uses: torch.Tensor
    samples: torch.Tensor
    num_collected: torch.Tensor

    def __init__(self, config: LavitPreTrainingConfig):
        super().__init__()
        tokenizer = config.visual_tokenizer_config
        size, width = tokenizer.codebook_size, tokenizer.codebook_dim
        self.config = config
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("quantized_steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_revived", torch.zeros((), dtype=torch.long))
        self.register_buffer("counts", torch.zeros(size))  # moving averages of tokens per code ...
        self.register_buffer("sums", torch.zeros(size, width))  # ... and of their sum
        self.register_buffer("uses", torch.zeros(size, dtype=torch.long))  # since codes were last revived
        self.register_buffer("samples", torch.zeros(config.num_kmeans_tokens, width))  # for k-means
        self.register_buffer("num_collected", torch.zeros((), dtype=torch.long))

    @torch.compiler.disable
    @torch.no_grad()
    def start(self, codebook: torch.Tensor, tokens: torch.Tensor) -> None:
        """Finds first codes, from the tokens of as many calls as it takes to collect enough of them.

        Args:
            codebook: Rows to write, `[codebook_size, codebook_dim]`.
            tokens: Normalized tokens of this process, `[tokens, codebook_dim]`.
        """
        if not self.config.kmeans_init:
            codebook.copy_(F.normalize(codebook, dim=-1))
            self._restart_averages(codebook, torch.ones_like(self.counts))
            return
        tokens = gather_rows(tokens.float())
        begin = int(self.num_collected)
        taken = tokens[: len(self.samples) - begin]
        self.samples[begin : begin + len(taken)] = taken
        self.num_collected += len(taken)
        if begin + len(taken) < len(self.samples):
            return
        centers, counts = spherical_kmeans(
            self.samples, len(codebook), self.config.kmeans_iterations, self._generator()
        )
        codebook.copy_(take_from_first_process(centers))
        self._restart_averages(codebook, take_from_first_process(counts) * (len(tokens) / len(self.samples)))

    @torch.compiler.disable
    @torch.no_grad()
    def update(self, codebook: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor) -> None:
        """Moves every row towards the mean of its tokens, and revives dead codes when their time has come.

        Args:
            codebook: Rows to write, `[codebook_size, codebook_dim]`.
            tokens: Normalized tokens of this process, `[tokens, codebook_dim]`.
            codes: Their codes, `[tokens]`.
        """
        tokens = tokens.detach().float()
        counts, sums = sum_by_code(tokens, codes, len(codebook))
        counts, sums = sum_over_processes(torch.cat([counts[:, None], sums], dim=1)).split([1, sums.shape[1]], dim=1)
        decay = self.config.ema_decay
        self.counts.lerp_(counts[:, 0], 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.uses += counts[:, 0].long()
        codebook.copy_(self._rows(codebook))
        self.quantized_steps += 1
        every = self.config.revive_every_steps
        if every and int(self.quantized_steps) % every == 0:
            self._revive(codebook, tokens)

    def _rows(self, codebook: torch.Tensor) -> torch.Tensor:
        # Averages of a code that nothing uses fade away; its row stays.
        lengths = self.sums.norm(dim=-1, keepdim=True)
        return torch.where(lengths > 1e-12, self.sums / lengths.clamp_min(1e-12), codebook.float())

    def _revive(self, codebook: torch.Tensor, tokens: torch.Tensor) -> None:
        """Moves codes without a single use since the last time to tokens that are badly represented."""
        tokens = gather_rows(tokens)
        dead = (self.uses == 0).nonzero().flatten()
        self.uses.zero_()
        # Likelier where the nearest row is far, as in k-means++; equal tokens are not all taken.
        _, distances = nearest_rows(tokens, codebook)
        is_candidate = distances > _REPRESENTED
        candidates, weights = tokens[is_candidate], distances[is_candidate]
        dead = dead[: len(candidates)]
        if len(dead):
            chosen = torch.multinomial(weights.double().cpu(), len(dead), generator=self._generator())
            rows = candidates[chosen.to(tokens.device)]
            codebook[dead] = rows
            self.counts[dead] = self.counts.mean()
            self.sums[dead] = rows * self.counts[dead, None]
            self.num_revived += len(dead)
        for tensor in (codebook, self.counts, self.sums, self.num_revived):
            take_from_first_process(tensor)

    def _restart_averages(self, codebook: torch.Tensor, counts: torch.Tensor) -> None:
        self.counts.copy_(counts)
        self.sums.copy_(codebook * counts[:, None])
        self.is_initialized.fill_(True)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + int(self.quantized_steps))


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


__all__ = ["LavitCodebookLearner"]
