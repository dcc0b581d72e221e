"""Trains small visual tokenizers that differ in one thing, and measures what their tokens still tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Trainer

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer, LavitVisualTokenizerForPreTraining
from lavit_hf.data.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    label_patches,
    make_scenes,
    render,
    sample_scene,
)
from lavit_hf.training import TrainingDataset, VisualTokenizerDataCollator

from .selection import KEEP_RATE, KEEP_RATE_RANGE, LEARNED, blind
from .training import training_arguments

CODEBOOK_SIZE = 1024
_CLASSES = {"shape": len(SHAPES) + 1, "color": len(COLORS) + len(BACKGROUNDS), "size": len(SIZES) + 1}
_PROBE_STEPS = 300


def build_tokenizer(
    trained: LavitVisualTokenizer, selection: str, is_quantized: bool, has_budgets: bool, num_steps: int
) -> Any:
    """A new visual tokenizer with its token decoder, around the encoder and the selector of a trained one.

    A selector that learns anew does so while the merger is bypassed, as stage 1 always does, and takes longer for it.
    """
    torch.manual_seed(0)
    learns = selection == LEARNED
    bypassed, quantized = (0.3, 0.45) if learns else (0.15, 0.4)
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
        vision_model=trained.vision_model,
        visual_tokenizer_config={
            "codebook_size": CODEBOOK_SIZE,
            "codebook_dim": 32,
            "initializer_range": 0.1,
            "merger_num_layers": 3,
        },
        token_decoder_config={"initializer_range": 0.1, "cross_attention_dims": [128], "pooled_size": None},
        keep_rate=KEEP_RATE,
        keep_rate_weight=2.0 if learns else 0.0,
        keep_rate_range=KEEP_RATE_RANGE if has_budgets else None,
        selector_steps=round(bypassed * num_steps) if learns else 0,
        calibration_steps=max(1, min(12, num_steps // 20)),
        bypass_merger_steps=round(bypassed * num_steps),
        quantize_after_steps=round(quantized * num_steps) if is_quantized else num_steps + 1,
    )
    if not learns:
        model.visual_tokenizer.discrete.selector.load_state_dict(trained.discrete.selector.state_dict())
    blind(model.visual_tokenizer, selection)
    return model


def train_tokenizer(model: Any, image_processor: Any, num_steps: int, output_dir: Path) -> None:
    """Trains it on scenes."""
    batch_size = 64
    trainer = Trainer(
        model=model,
        args=training_arguments(output_dir, num_steps, batch_size, learning_rate=3e-3, weight_decay=0.01),
        train_dataset=TrainingDataset(make_scenes("train", num_scenes=num_steps * batch_size), "image", None),
        data_collator=VisualTokenizerDataCollator(image_processor),
    )
    trainer.train()
    model.eval()


@torch.no_grad()
def decode_features(
    model: Any, pixel_values: torch.Tensor, num_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the encoder and those decoded from tokens, `[batch, num_patches, hidden]`, and numbers of tokens.

    With `num_tokens` every picture becomes so many codes; else the selector decides.
    """
    parts = []
    for part in pixel_values.split(100):
        if num_tokens is None:
            output = model(pixel_values=part)
            parts.append((output.patch_features, output.features, output.num_tokens))
        else:
            tokens = model.visual_tokenizer.encode(part, num_tokens=num_tokens)
            decoded = model.token_decoder(tokens.codes, tokens.num_tokens).features
            parts.append((tokens.patch_features, decoded, tokens.num_tokens))
    features, decoded, counts = (torch.cat(values) for values in zip(*parts, strict=True))
    return features, decoded, counts


def measure_tokenizer(
    model: Any, image_processor: LavitImageProcessorPil, num_scenes: int, budgets: Sequence[int] = ()
) -> dict[str, Any]:
    """What a linear layer that learned to read the encoder's features reads from decoded ones, on new scenes.

    Returns:
        `tokens` per picture, `cosine` of decoded features with the encoder's, and `patches_right`: the share of
        patches with an object whose shape, color and size are all read right. The same of every budget in `budgets`.
    """
    torch.manual_seed(0)  # for patches that are kept by chance
    labels, pixel_values = _load(model, image_processor, "train", num_scenes)
    features, _, _ = decode_features(model, pixel_values)
    torch.manual_seed(0)
    probe = torch.nn.Linear(features.shape[-1], sum(_CLASSES.values()))
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(_PROBE_STEPS):
        rows = torch.randint(len(features), (100,))
        scores = probe(_normalize(features[rows])).split(list(_CLASSES.values()), dim=-1)
        loss = sum(F.cross_entropy(one.flatten(0, 1), labels[rows, :, i].flatten()) for i, one in enumerate(scores))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    labels, pixel_values = _load(model, image_processor, "validation", num_scenes)
    found = {
        budget: _compare(probe, labels, *decode_features(model, pixel_values, budget)) for budget in (None, *budgets)
    }
    own = found.pop(None)
    return own | {"budgets": {str(budget): values for budget, values in found.items()}}


def _compare(
    probe: torch.nn.Linear,
    labels: torch.Tensor,
    features: torch.Tensor,
    decoded: torch.Tensor,
    num_tokens: torch.Tensor,
) -> dict[str, float]:
    scores = probe(_normalize(decoded)).split(list(_CLASSES.values()), dim=-1)
    is_right = torch.stack([one.argmax(dim=-1) for one in scores], dim=-1).eq(labels).all(dim=-1)
    is_object = labels[..., 0] != len(SHAPES)
    return {
        "tokens": num_tokens.float().mean().item(),
        "cosine": F.cosine_similarity(features, decoded, dim=-1).mean().item(),
        "patches_right": is_right[is_object].float().mean().item(),
    }


def _load(model: Any, image_processor: Any, split: str, num_scenes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels `[scenes, num_patches, 3]` and pixels of scenes of a split."""
    scenes = [sample_scene(split, 0, index) for index in range(num_scenes)]
    side = round(model.config.visual_tokenizer_config.num_patches**0.5)
    found = [label_patches(scene, side) for scene in scenes]
    labels = np.stack([np.stack([getattr(one, name) for name in _CLASSES], axis=-1) for one in found])
    pixel_values = image_processor([render(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
    return torch.tensor(labels), pixel_values


def _normalize(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features, features.shape[-1:])
