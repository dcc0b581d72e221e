"""A small autoencoder learns to rebuild scenes, with 16 x 16 pixels here to take half a minute on one core."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from lavit_hf.data.scenes import make_scenes
from lavit_hf.training.accelerated.loop import AcceleratedLoop
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.pixel_decoder.autoencoder import AutoencoderArguments, AutoencoderTask
from lavit_hf.training.pixel_decoder.image_collator import ImageDataCollator


def test_reconstructions_come_closer_to_the_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    args = AutoencoderArguments(
        output_dir=str(tmp_path),
        train_batch_size=16,
        max_train_steps=150,
        learning_rate=3e-3,
        lr_scheduler="cosine",
        ema_decay=0.98,
        num_validation_images=0,
        checkpointing_steps=0,
    )
    train, held_out = (
        TrainingDataset(make_scenes(split, num_scenes=count), text_column=None)
        for split, count in (("train", 1000), ("validation", 32))
    )
    collator = ImageDataCollator(16, 16, multiple=2)
    task = AutoencoderTask(vae, args, collator, [held_out[index] for index in range(32)])
    before = task.validate()[0]["psnr"]
    AcceleratedLoop(task, args, train, collator).train()
    after = task.validate()[0]["psnr"]
    assert after > before + 5 and after > 14
