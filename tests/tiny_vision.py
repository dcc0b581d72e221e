"""A small vision encoder that knows scenes, trained within seconds."""

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel

from lavit_hf import LavitImageProcessorPil
from lavit_hf.data.scenes import BACKGROUNDS, COLORS, SHAPES, Scene
from lavit_hf.data.scenes.patches import label_patches
from lavit_hf.modeling.modeling_lavit_visual_tokenizer import build_vision_model

IMAGE_SIZE, PATCH_SIZE, WIDTH = 48, 8, 48
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def image_processor() -> LavitImageProcessorPil:
    return LavitImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def pixel_values(scenes: Dataset) -> torch.Tensor:
    return image_processor()(images=list(scenes["image"]), return_tensors="pt")["pixel_values"]


def patch_labels(scenes: Dataset) -> torch.Tensor:
    """Color and shape of every patch, as `label_patches` numbers them, `[scenes, 2, NUM_PATCHES]`."""
    found = [label_patches(Scene.from_dict(row), IMAGE_SIZE // PATCH_SIZE) for row in scenes["scene"]]
    return torch.tensor(np.stack([[one.color, one.shape] for one in found]))


def train_vision_model(scenes: Dataset, num_steps: int = 150, batch_size: int = 64) -> Blip2VisionModel:
    """A ViT whose features tell what each patch shows and where it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_vision_model(
            Blip2VisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                initializer_range=0.1,
            )
        )
        sizes = [len(COLORS) + len(BACKGROUNDS), len(SHAPES) + 1, NUM_PATCHES]
        head = nn.Linear(WIDTH, sum(sizes))
    pixels, labels = pixel_values(scenes), patch_labels(scenes)
    places = torch.arange(NUM_PATCHES).expand(batch_size, -1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
        features = model(pixel_values=pixels[chosen]).last_hidden_state[:, 1:]
        logits = head(F.layer_norm(features, (WIDTH,))).transpose(1, 2).split(sizes, dim=1)
        targets = (*labels[chosen].unbind(dim=1), places)
        loss = sum(F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
