"""Which weights made something: codes mean nothing to a model with another codebook."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ...modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer


def codebook_fingerprint(visual_tokenizer: Any) -> str:
    """SHA-256 of the codebook, `[codebook_size, codebook_dim]` in fp32; equal exactly if codes mean the same.

    Args:
        visual_tokenizer: A `LavitVisualTokenizer`, or a model that has one.
    """
    tokenizer = _visual_tokenizer_of(visual_tokenizer)
    return _digest([("codebook", tokenizer.discrete.quantizer.codebook.weight.float())])


def weights_fingerprint(visual_tokenizer: Any) -> str:
    """SHA-256 of all weights that an image's codes depend on, with their dtypes."""
    tokenizer = _visual_tokenizer_of(visual_tokenizer)
    names = sorted(name for name in tokenizer.state_dict() if not name.startswith("continuous."))
    return _digest([(name, tokenizer.state_dict()[name]) for name in names])


def module_fingerprint(*modules: torch.nn.Module) -> str:
    """SHA-256 of all weights of these modules, with their dtypes."""
    return _digest(
        [
            (f"{index}.{name}", tensor)
            for index, module in enumerate(modules)
            for name, tensor in sorted(module.state_dict().items())
        ]
    )


def _visual_tokenizer_of(model: Any) -> LavitVisualTokenizer:
    found = model if isinstance(model, LavitVisualTokenizer) else getattr(model, "visual_tokenizer", None)
    if not isinstance(found, LavitVisualTokenizer):
        raise TypeError(f"Expected a visual tokenizer, or a model with one, got {type(model).__name__}.")
    return found


def _digest(tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = ["codebook_fingerprint", "module_fingerprint", "weights_fingerprint"]
