"""What happens to single tensors on their way from the original to a model and back."""

from __future__ import annotations

import torch

from .errors import ConversionError


def join(parts: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Makes a target out of the original's tensors.

    Args:
        parts: Marks (see `names`) and tensors, in the order of the marks.

    Returns:
        The target: one tensor as it is or without its leading 1, or the packed bias `[query; 0; value]`.
    """
    (mark, first), *others = parts
    if mark == "query":
        value = others[0][1]
        dtype = torch.promote_types(first.dtype, value.dtype)
        return torch.cat([first.to(dtype), torch.zeros_like(first, dtype=dtype), value.to(dtype)])
    return first.squeeze(0) if mark == "batched" else first


def split(target: torch.Tensor, mark: str) -> torch.Tensor:
    """Makes the original's tensor out of a target; the opposite of `join`.

    The bias of the keys, if training gave it values, is dropped: the softmax over the keys does not see it.
    """
    if mark == "batched":
        return target.unsqueeze(0)
    if mark in ("query", "value"):
        return target.chunk(3)[0 if mark == "query" else 2].clone()
    return target


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turns `"bfloat16"` into `torch.bfloat16`; `None` (also as `"auto"`) keeps every tensor as stored."""
    if dtype is None or dtype == "auto":
        return None
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point or resolved.itemsize < 2:
        raise ConversionError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}.")
    return resolved


def cast_dtype(stored: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: only floating point is cast."""
    return cast if cast is not None and stored.is_floating_point else stored


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
