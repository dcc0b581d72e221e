"""Trains a small VAE for pixel decoders of one's own, on any pictures.

    python examples/train_autoencoder.py --dataset scenes --validation_split validation --output_dir out/vae \
        --height 64 --width 64 --per_device_train_batch_size 32 --learning_rate 2e-3 --max_steps 2000

On several devices: `accelerate launch examples/train_autoencoder.py ...`. `--config FILE.yaml` takes options
from a file, `--help` lists them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lavit_hf.training import (
    AutoencoderArguments,
    AutoencoderTrainer,
    ImageDataCollator,
    TrainingDataset,
    exit_on_write_errors,
    load_data,
    parse_script_arguments,
)

# 64 pixels become 8 x 8 latents; about 0.9 M parameters.
SMALL_VAE = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}


@dataclass
class ModelArguments:
    """Which autoencoder to train."""

    vae: str | None = field(default=None, metadata={"help": "An AutoencoderKL to go on with; by default a new one."})
    vae_config: str | None = field(default=None, metadata={"help": "A JSON file for a new one; by default small."})


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(
        metadata={"help": "A folder of images, one of save_to_disk, the name of a dataset, 'scenes' or 'emoji'."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split to validate on; by default none."})
    num_validation_rows: int = field(default=64, metadata={"help": "How many rows of it to use."})
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes' and 'emoji': how many to train on."})
    height: int | None = field(default=None, metadata={"help": "Height of the pictures; by default the model's."})
    width: int | None = field(default=None, metadata={"help": "Width of the pictures; by default the model's."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about corrupt images: skip or raise."})


def main(arguments: list[str] | None = None) -> AutoencoderTrainer:
    """Trains; returns the trainer."""
    model_args, data_args, args = parse_script_arguments(
        (ModelArguments, DataArguments, AutoencoderArguments), arguments, __doc__
    )
    if data_args.validation_split is None:
        raise SystemExit("Give --validation_split: the scale of the latents is measured on it.")
    torch.manual_seed(args.seed)  # for weights that start at random
    vae = load_vae(model_args)
    trainer = AutoencoderTrainer(
        vae,
        args,
        train_dataset=load_split(data_args, data_args.train_split, data_args.num_scenes),
        eval_dataset=load_validation_rows(data_args),
        data_collator=ImageDataCollator(
            height=data_args.height or vae.config.sample_size,
            width=data_args.width or vae.config.sample_size,
            multiple=2 ** (len(vae.config.block_out_channels) - 1),
            seed=args.seed,
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer


def load_vae(model_args: ModelArguments) -> Any:
    """The autoencoder to train."""
    if model_args.vae is not None:
        return AutoencoderKL.from_pretrained(model_args.vae)
    config = (
        json.loads(Path(model_args.vae_config).read_text(encoding="utf-8")) if model_args.vae_config else SMALL_VAE
    )
    return AutoencoderKL.from_config(config)


def load_split(data_args: DataArguments, split: str, num_scenes: int) -> TrainingDataset:
    """A split of the dataset."""
    rows, root = load_data(data_args.dataset, split, num_scenes=num_scenes)
    return TrainingDataset(rows, data_args.image_column, None, data_args.on_bad_sample, image_root=root)


def load_validation_rows(data_args: DataArguments) -> list[dict[str, Any]]:
    """Samples held out for validation."""
    samples = load_split(data_args, data_args.validation_split, data_args.num_validation_rows)
    return [samples[index] for index in range(min(len(samples), data_args.num_validation_rows))]


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
