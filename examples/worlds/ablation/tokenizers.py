"""Trains small visual tokenizers that differ in one thing, and measures what their tokens still tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Trainer

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer, LavitVisualTokenizerForPreTraining
from lavit_hf.data.worlds import IGNORED, World
from lavit_hf.training import TrainingDataset, VisualTokenizerDataCollator

from .selection import KEEP_RATE, KEEP_RATE_RANGE, LEARNED, blind
from .training import training_arguments

_PROBE_STEPS = 300


def build_tokenizer(
    trained: LavitVisualTokenizer, selection: str, is_quantized: bool, has_budgets: bool, num_steps: int
) -> Any:
    """A new visual tokenizer with its token decoder, around the encoder and the selector of a trained one.

    A selector that learns anew does so while the merger is bypassed, as stage 1 always does, and takes longer for it.
    """
    torch.manual_seed(0)
    config = trained.config
    learns = selection == LEARNED
    bypassed, quantized = (0.3, 0.45) if learns else (0.15, 0.4)
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
        vision_model=trained.vision_model,
        visual_tokenizer_config={
            "codebook_size": config.codebook_size,
            "codebook_dim": config.codebook_dim,
            "initializer_range": config.initializer_range,
            "merger_num_layers": config.merger_num_layers,
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


def train_tokenizer(
    model: Any, world: World, image_processor: Any, num_steps: int, output_dir: Path, bf16: bool
) -> None:
    """Trains it on scenes."""
    batch_size = 64
    trainer = Trainer(
        model=model,
        args=training_arguments(output_dir, num_steps, batch_size, 3e-3, 0.01, bf16),
        train_dataset=TrainingDataset(world.make_dataset(world.splits[0], num_steps * batch_size), "image", None),
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
    model: Any, world: World, image_processor: LavitImageProcessorPil, num_scenes: int, budgets: Sequence[int] = ()
) -> dict[str, Any]:
    """What a linear layer that learned to read the encoder's features reads from decoded ones, on new scenes.

    Returns:
        `tokens` per picture, `cosine` of decoded features with the encoder's, and `patches_right`: the share of
        patches with an object of which every label of the world is read right. The same of every budget in `budgets`.
    """
    torch.manual_seed(0)  # for patches that are kept by chance
    classes = list(world.label_classes.values())
    labels, _, pixel_values = _load(model, world, image_processor, world.splits[0], num_scenes)
    features, _, _ = decode_features(model, pixel_values)
    torch.manual_seed(0)
    probe = torch.nn.Linear(features.shape[-1], sum(classes))
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(_PROBE_STEPS):
        rows = torch.randint(len(features), (100,))
        scores = probe(_normalize(features[rows])).split(classes, dim=-1)
        loss = sum(
            F.cross_entropy(one.flatten(0, 1), labels[rows, :, i].flatten(), ignore_index=IGNORED)
            for i, one in enumerate(scores)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    labels, is_object, pixel_values = _load(model, world, image_processor, world.splits[1], num_scenes)

    def compare(budget: int | None) -> dict[str, float]:
        features, decoded, num_tokens = decode_features(model, pixel_values, budget)
        scores = probe(_normalize(decoded)).split(classes, dim=-1)
        found = torch.stack([one.argmax(dim=-1) for one in scores], dim=-1)
        is_right = ((found == labels) | (labels == IGNORED)).all(dim=-1)
        return {
            "tokens": num_tokens.float().mean().item(),
            "cosine": F.cosine_similarity(features, decoded, dim=-1).mean().item(),
            "patches_right": is_right[is_object].float().mean().item(),
        }

    found = {budget: compare(budget) for budget in (None, *budgets)}
    own = found.pop(None)
    return own | {"budgets": {str(budget): values for budget, values in found.items()}}


def _load(
    model: Any, world: World, image_processor: Any, split: str, num_scenes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels of scenes of a split, `[scenes, num_patches, labels]`, where there are objects, and pixels."""
    side = round(model.config.visual_tokenizer_config.num_patches**0.5)
    pictures = world.labeled_pictures(split, 0, np.arange(num_scenes), side, np.zeros(num_scenes, bool))
    labels = np.stack([pictures.classes[name] for name in world.label_classes], axis=-1)
    images = [Image.fromarray(pixels) for pixels in pictures.pixels]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    return torch.from_numpy(labels), torch.from_numpy(pictures.is_object), pixel_values


def _normalize(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features, features.shape[-1:])
