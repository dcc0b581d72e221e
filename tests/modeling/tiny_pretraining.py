"""A tiny model for stage 1, and what its phases train."""

from typing import Any

import torch

from lavit_hf.modeling.configuration_lavit import LavitPreTrainingConfig
from lavit_hf.modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from tiny_models import spread_selector, visual_tokenizer_config

# Every phase, within few steps.
SCHEDULE = {
    "bypass_merger_steps": 2,
    "selector_steps": 2,
    "calibration_steps": 1,
    "quantize_after_steps": 3,
    "kmeans_tokens_per_code": 2,
}


def pretraining_config(visual: dict | None = None, **values: Any) -> LavitPreTrainingConfig:
    return LavitPreTrainingConfig(
        visual_tokenizer_config=visual_tokenizer_config(
            **{"attention_smoothing": 0, "share_branches": True, **(visual or {})}
        ),
        token_decoder_config={"cross_attention_dims": [8], "pooled_size": None, "initializer_range": 0.2},
        **values,
    )


def build_pretraining_model(seed: int = 0, **values: Any) -> LavitVisualTokenizerForPreTraining:
    torch.manual_seed(seed)
    model = LavitVisualTokenizerForPreTraining(pretraining_config(**values)).train()
    spread_selector(model.visual_tokenizer)
    return model


def seeds(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count)


def names_with_gradient(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}


def train_steps(model: LavitVisualTokenizerForPreTraining, pixels: torch.Tensor, count: int) -> list[float]:
    """Losses of some steps of training on the same pictures."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    losses = []
    for step in range(count):
        loss = model(pixels, sample_seeds=seeds(len(pixels), 100 * step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
