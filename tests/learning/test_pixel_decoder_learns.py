"""Stage 3 learns to draw scenes from their codes.

To take less than a minute on one core, scenes are drawn with 16 x 16 pixels, and two parts that are not trained here
are made by hand: the VAE only moves blocks of 2 x 2 pixels into channels and back, without loss, and a picture's codes
are the nearest colors of a palette to the mean colors of its 16 patches.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch.nn import functional as F

from lavit_hf.data.scenes import BACKGROUNDS, COLORS, make_scenes
from lavit_hf.training.pixel_decoder.data import PixelDecoderDataCollator, PixelDecoderDataset
from lavit_hf.training.pixel_decoder.pixel_decoder import (
    PixelDecoderArguments,
    PixelDecoderTrainer,
    build_pixel_decoder,
)
from tiny_pixel_decoders import build_token_decoder

GRID = 4
PALETTE = np.array(sorted({*COLORS.values(), *BACKGROUNDS.values()}))
UNET = {
    "sample_size": 8,
    "block_out_channels": [24, 48],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 48,
}


class BlockVae(ModelMixin, ConfigMixin):
    """Blocks of 2 x 2 pixels become channels, and channels become blocks."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, block_out_channels=(1, 1), latent_channels=12, scaling_factor=1.0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # gives the model a device and a dtype

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        latents = F.pixel_unshuffle(pixels, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents, std=torch.zeros_like(latents)))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (F.pixel_shuffle(latents, 2),)


def codes_of(image: Image.Image) -> list[int]:
    colors = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), float).reshape(-1, 1, 3)
    return np.square(colors - PALETTE).sum(axis=-1).argmin(axis=-1).tolist()


def scenes(split: str, count: int) -> PixelDecoderDataset:
    images = make_scenes(split, num_scenes=count)["image"]
    return PixelDecoderDataset([{"image": image, "codes": [codes_of(image)]} for image in images])


def test_drawings_from_codes_look_like_the_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = build_token_decoder(
        codebook_size=len(PALETTE), codebook_dim=8, hidden_size=48, num_heads=4, intermediate_size=96, output_size=48
    )
    pipeline = build_pixel_decoder(decoder, BlockVae(), UNET)
    args = PixelDecoderArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=250,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        ema_decay=0.98,
        weight_decay=0.0,
        train_token_decoder=True,
        num_validation_images=0,
        save_strategy="no",
        use_cpu=True,
    )
    collator, held_out = PixelDecoderDataCollator(pipeline), scenes("validation", 16)
    samples = [held_out[index] for index in range(len(held_out))]
    trainer = PixelDecoderTrainer(pipeline, args, scenes("train", 1024), collator, eval_dataset=samples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before / 2

    batch = collator(samples)
    truth = pipeline.image_processor.denormalize(batch["pixel_values"])
    codes = list(batch["codes"].split(batch["num_tokens"].tolist()))

    def error(of_codes: list[torch.Tensor]) -> float:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(truth))]
        drawn = pipeline(
            of_codes, num_inference_steps=12, guidance_scale=2.0, generator=generators, output_type="pt"
        ).images
        return F.mse_loss(drawn, truth).item()

    assert error(codes) < 0.6 * error(codes[1:] + codes[:1])
