"""Trains a small VAE for pixel decoders of one's own, on any pictures.

    python examples/train_autoencoder.py --dataset scenes --validation_split validation --output_dir out/vae \
        --height 64 --width 64 --train_batch_size 32 --learning_rate 2e-3 --max_train_steps 2000

On several devices: `accelerate launch examples/train_autoencoder.py ...`. `--help` lists all options.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from image_data import DataArguments, load_training_data, load_validation_rows
from transformers import HfArgumentParser

from lavit_hf.training.pixel_decoder.autoencoder import AutoencoderArguments, train_autoencoder
from lavit_hf.training.pixel_decoder.image_collator import ImageDataCollator
from lavit_hf.utils.atomic_files import exit_on_write_errors

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


def main(arguments: list[str] | None = None) -> float:
    """Trains; returns the last loss."""
    parser = HfArgumentParser((ModelArguments, DataArguments, AutoencoderArguments), description=__doc__)
    model, data, args = parser.parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    set_seed(args.seed)  # for weights that start at random
    if data.validation_split is None:
        raise SystemExit("Give --validation_split: the scale of the latents is measured on it.")
    vae = load_vae(model)
    collator = ImageDataCollator(
        height=data.height or vae.config.sample_size,
        width=data.width or vae.config.sample_size,
        multiple=2 ** (len(vae.config.block_out_channels) - 1),
        seed=args.seed,
    )
    return train_autoencoder(vae, args, load_training_data(data), collator, load_validation_rows(data))


def load_vae(model: ModelArguments) -> Any:
    """The autoencoder to train."""
    if model.vae is not None:
        return AutoencoderKL.from_pretrained(model.vae)
    config = json.loads(Path(model.vae_config).read_text(encoding="utf-8")) if model.vae_config else SMALL_VAE
    return AutoencoderKL.from_config(config)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
