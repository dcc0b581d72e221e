"""A small autoencoder learns to rebuild scenes, with 16 x 16 pixels here to take half a minute on one core."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from lavit_hf.data.scenes import make_scenes
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.pixel_decoder.autoencoder import AutoencoderArguments, AutoencoderTrainer
from lavit_hf.training.pixel_decoder.data import ImageDataCollator


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
        per_device_train_batch_size=16,
        max_steps=150,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        ema_decay=0.98,
        num_validation_images=0,
        save_strategy="no",
        use_cpu=True,
    )
    train, held_out = (
        TrainingDataset(make_scenes(split, num_scenes=count), text_column=None)
        for split, count in (("train", 1000), ("validation", 32))
    )
    collator = ImageDataCollator(16, 16, multiple=2)
    trainer = AutoencoderTrainer(vae, args, train, collator, [held_out[index] for index in range(32)])
    before = trainer.evaluate()["eval_psnr"]
    trainer.train()
    after = trainer.evaluate()["eval_psnr"]
    assert after > before + 5 and after > 14
