"""A small vision encoder that knows scenes, trained within seconds."""

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel

from lavit_hf import LavitImageProcessorPil
from lavit_hf.data.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, object_coverage
from lavit_hf.modeling.modeling_lavit_visual_tokenizer import build_vision_model

IMAGE_SIZE, PATCH_SIZE, WIDTH = 48, 8, 48
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
_VISIBLE = 0.3  # of a patch, from which on it shows an object


def image_processor() -> LavitImageProcessorPil:
    return LavitImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def pixel_values(scenes: Dataset) -> torch.Tensor:
    return image_processor()(images=list(scenes["image"]), return_tensors="pt")["pixel_values"]


def patch_labels(scenes: Dataset) -> torch.Tensor:
    """Color (of the object, or after those of the background) and shape (0 is none), `[scenes, 2, NUM_PATCHES]`."""
    labels = []
    for row in scenes["scene"]:
        scene = Scene.from_dict(row)
        cover = F.avg_pool2d(torch.tensor(object_coverage(scene, IMAGE_SIZE)), PATCH_SIZE).flatten(1)
        strongest, index = cover.max(dim=0)
        colors = torch.tensor([list(COLORS).index(item.color) for item in scene.objects])[index]
        shapes = torch.tensor([SHAPES.index(item.shape) + 1 for item in scene.objects])[index]
        is_object = strongest > _VISIBLE
        background = torch.tensor(len(COLORS) + list(BACKGROUNDS).index(scene.background))
        labels.append(torch.stack([torch.where(is_object, colors, background), shapes * is_object]))
    return torch.stack(labels)


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
