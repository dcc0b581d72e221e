"""Fingerprints of weights: the same exactly if every bit is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def module_fingerprint(*modules: torch.nn.Module) -> str:
    """SHA-256 of all weights of these modules, with their names and dtypes."""
    return tensor_fingerprint(
        (f"{index}.{name}", tensor)
        for index, module in enumerate(modules)
        for name, tensor in sorted(module.state_dict().items())
    )


def tensor_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of named tensors, in the order given, with their dtypes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
