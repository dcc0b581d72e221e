"""LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) with PEFT: what to adapt in a LaVIT, and what to leave."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import nn

from ...modeling.modeling_lavit import LavitForConditionalGeneration


def get_lora_config(model: LavitForConditionalGeneration | None = None, **kwargs: Any) -> LoraConfig:
    """The `LoraConfig` of a LaVIT, for `peft.get_peft_model`.

    Adapts every linear layer of the language model and the projection of images. The visual tokenizer stays as it is:
    an adapted one would give other codes than the language model has learned. Embeddings and head are trained whole,
    because visual ids that nothing has trained yet cannot be reached through adapters; where they have been trained,
    as in published checkpoints, `modules_to_save=None` saves most of the memory.

    Args:
        model: The model to adapt. Only its names are looked at: not every language model calls its embeddings
            `embed_tokens`, and tied embeddings have to stay tied. Without it names are those of Llama, untied.
        kwargs: Values of `LoraConfig` that replace those of this function.

    Returns:
        The configuration, with rank 16 and scale 2 (`lora_alpha=32`).
    """
    values: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "exclude_modules": r".*visual_tokenizer.*",
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": TaskType.CAUSAL_LM,
    }
    if model is not None:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        values["modules_to_save"] = [_last_name(model, module) for module in modules]
    values.update(kwargs)
    if model is not None and model.config.tie_word_embeddings and values["modules_to_save"]:
        values.setdefault("ensure_weight_tying", True)
    return LoraConfig(**values)


def upcast_trained_weights(model: nn.Module) -> None:
    """Brings what is trained to fp32, for training with mixed precision on a base model in half precision.

    PEFT does so for adapters, but not for the copies of embeddings and head, in which bfloat16 would round away most
    steps of usual learning rates.

    Args:
        model: What `get_peft_model` returned.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _last_name(model: nn.Module, module: nn.Module | None) -> str:
    return next(name for name, other in model.named_modules() if other is module).rpartition(".")[-1]


__all__ = ["get_lora_config", "upcast_trained_weights"]
