"""Linear layers of a few rows on a CPU with several cores.

A decoding step multiplies every weight by as many rows as there are sequences; with guidance there are at least two.
The BLAS library of PyTorch's builds runs such flat products on one core (seen with MKL on AMD: `benchmarks/draw.py`).
Here every core gets its share of a weight's rows instead.
"""

from __future__ import annotations

import functools
from types import TracebackType

import torch
from torch import nn
from torch.nn import functional as F

# With a single row BLAS is as fast as memory, and from about here on it uses all cores by itself.
_FEWEST_ROWS, _MOST_ROWS = 2, 16
_FEWEST_WEIGHTS = 1 << 18  # smaller ones are multiplied before another core has heard of it


def split_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Same as `torch.nn.functional.linear`, up to rounding, and faster for a few rows on a CPU.

    Args:
        hidden: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.

    Returns:
        `[..., out]`.
    """
    if torch.compiler.is_compiling() or not _is_worth_it(hidden, weight, num_parts := torch.get_num_threads()):
        return F.linear(hidden, weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1])
    rest = len(weight) % num_parts
    parts = weight[: len(weight) - rest].unflatten(0, (num_parts, -1))
    # A batched product runs its matrices in parallel: [parts, rows, out / parts].
    product = torch.bmm(rows.expand(num_parts, -1, -1), parts.transpose(1, 2)).transpose(0, 1).flatten(1)
    if rest:
        product = torch.cat([product, F.linear(rows, weight[-rest:])], dim=-1)
    if bias is not None:
        product = product + bias
    return product.view(*hidden.shape[:-1], -1)


def _is_worth_it(hidden: torch.Tensor, weight: torch.Tensor, num_threads: int) -> bool:
    if num_threads == 1 or hidden.device.type != "cpu" or not hidden.dtype == weight.dtype == torch.float32:
        return False
    num_rows = hidden.numel() // hidden.shape[-1]
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and not torch.is_autocast_enabled("cpu")
    is_large = weight.numel() >= _FEWEST_WEIGHTS and len(weight) >= num_threads
    return is_plain and is_large and _FEWEST_ROWS <= num_rows <= _MOST_ROWS


class SplitLinears:
    """Within this context the plain linear layers of a model run as [`split_linear`].

    Layers of another class (quantized or adapted ones), and those whose forward somebody else has replaced (offloading
    does), stay as they are.

    Args:
        model: The model that decodes.
    """

    def __init__(self, model: nn.Module):
        layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        # Set past `Module.__setattr__`, which costs more than some of the layers.
        self._replacements = [(vars(layer), functools.partial(_forward, layer)) for layer in layers]

    def __enter__(self) -> None:
        for attributes, forward in self._replacements:
            attributes["forward"] = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attributes, _ in self._replacements:
            attributes.pop("forward", None)


def _forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return split_linear(input, layer.weight, layer.bias)


__all__ = ["SplitLinears", "split_linear"]
