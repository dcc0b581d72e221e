"""Numbers to watch while a visual tokenizer learns, over as many batches as lie between two looks."""

from __future__ import annotations

import torch

from ..utils.distributed import sum_over_processes
from .selector import KEEP


class TokenizerMetrics:
    """Sums over batches; what becomes of them is only computed when asked for.

    Args:
        codebook_size: Number of visual codes.
    """

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self._sums: dict[str, torch.Tensor] = {}
        self._uses: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return not self._sums

    @torch.compiler.disable
    @torch.no_grad()
    def update(
        self,
        losses: dict[str, torch.Tensor],
        cosine: torch.Tensor,
        is_kept: torch.Tensor,
        log_probs: torch.Tensor,
        codes: torch.Tensor | None,
    ) -> None:
        """Adds a batch.

        Args:
            losses: Terms of the loss by name, each a mean over images.
            cosine: Similarity of features and their reconstruction, `[batch, num_patches]`.
            is_kept: The decision that was taken, `[batch, num_patches]`.
            log_probs: The selector's scores, `[batch, num_patches, 2]`.
            codes: Codes of all tokens, `[total]`, if there are any.
        """
        rate = is_kept.double().mean(dim=-1)
        probability = log_probs[..., KEEP].double().exp()
        argmax = (log_probs[..., KEEP] > log_probs[..., 1 - KEEP]).double().mean(dim=-1)
        self._add("images", torch.ones_like(rate).sum())
        for name, loss in losses.items():
            self._add(name, loss.double() * len(rate))
        self._add("cosine", cosine.double().mean(dim=-1).sum())
        for name, values in (("keep_rate", rate), ("argmax_keep_rate", argmax)):
            self._add(name, values.sum())
            self._add(f"{name}_squared", values.square().sum())
        self._add("empty", (argmax == 0).double().sum())
        self._add("probability", probability.mean(dim=-1).sum())
        self._add("probability_squared", probability.square().mean(dim=-1).sum())
        if codes is not None:
            uses = torch.bincount(codes, minlength=self.codebook_size)
            self._uses = uses if self._uses is None else self._uses + uses

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def compute(self) -> dict[str, float]:
        """Means over the images of all processes, each of which has to call this.

        Returns:
            The terms of the loss; `cosine`; `keep_rate` and `keep_rate_spread` (standard deviation over images) as
            decided; `argmax_keep_rate`, `argmax_keep_rate_spread` and `argmax_empty_images` (share of images without a
            token) as inference would decide; `keep_probability_spread` (over patches: near zero the selector tells
            nothing apart); with codes also `live_codes`, `used_tokens` and `perplexity`.
        """
        names = list(self._sums)
        totals = sum_over_processes(torch.stack([self._sums[name] for name in names])).tolist()
        sums = dict(zip(names, totals, strict=True))
        images = sums.pop("images")
        means = {name: value / images for name, value in sums.items()}
        metrics = {name: value for name, value in means.items() if name.endswith("_loss")}
        metrics["cosine"] = means["cosine"]
        for name in ("keep_rate", "argmax_keep_rate"):
            metrics[name] = means[name]
            metrics[f"{name}_spread"] = _deviation(means[name], means[f"{name}_squared"])
        metrics["argmax_empty_images"] = means["empty"]
        metrics["keep_probability_spread"] = _deviation(means["probability"], means["probability_squared"])
        if self._uses is not None:
            uses = sum_over_processes(self._uses)
            metrics["live_codes"] = int((uses > 0).sum())
            metrics["used_tokens"] = int(uses.sum())
            metrics["perplexity"] = float(perplexity(uses))
        return metrics


def perplexity(uses: torch.Tensor) -> torch.Tensor:
    """How many equally common codes would be as hard to guess as codes that were used so often, `[codebook_size]`."""
    share = uses.double() / uses.sum().clamp_min(1)
    return torch.special.entr(share).sum().exp()


def _deviation(mean: float, mean_square: float) -> float:
    return max(mean_square - mean * mean, 0.0) ** 0.5


__all__ = ["TokenizerMetrics", "perplexity"]
