"""Stage 3: trains or fine-tunes a pixel decoder, which draws images from visual codes.

    python examples/train_pixel_decoder.py --dataset photos/ --pixel_decoder path/to/lavit --visual_tokenizer \
        path/to/lavit --output_dir out/pixel-decoder --max_train_steps 1000 --learning_rate 1e-5

On several devices: `accelerate launch examples/train_pixel_decoder.py ...`. `--help` lists all options.
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

from lavit_hf import LavitImageProcessorPil, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from lavit_hf.training.pixel_decoder.building import build_pixel_decoder
from lavit_hf.training.pixel_decoder.collator import PixelDecoderDataCollator
from lavit_hf.training.pixel_decoder.task import PixelDecoderArguments, train_pixel_decoder
from lavit_hf.utils.atomic_files import exit_on_write_errors


@dataclass
class ModelArguments:
    """What to train: an existing pixel decoder, or a new one around a token decoder and a VAE."""

    pixel_decoder: str | None = field(default=None, metadata={"help": "A LaVIT, or a pixel decoder, to fine-tune."})
    decoder: str | None = field(default=None, metadata={"help": "Which one of a LaVIT: highres or lowres."})
    token_decoder: str | None = field(default=None, metadata={"help": "From scratch: the token decoder of stage 1."})
    vae: str | None = field(default=None, metadata={"help": "From scratch: a trained AutoencoderKL."})
    unet_config: str | None = field(default=None, metadata={"help": "From scratch: a JSON file."})
    scheduler_config: str | None = field(default=None, metadata={"help": "From scratch: changes to it, a JSON file."})
    visual_tokenizer: str | None = field(
        default=None, metadata={"help": "A LaVIT, or a visual tokenizer; not needed if the dataset has codes."}
    )
    original_sizes: bool = field(default=False, metadata={"help": "SDXL: tell the U-Net the images' original sizes."})


def main(arguments: list[str] | None = None) -> float:
    """Trains; returns the last loss."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PixelDecoderArguments), description=__doc__)
    model, data, args = parser.parse_args_into_dataclasses(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    set_seed(args.seed)  # for weights that start at random
    pipeline = load_pixel_decoder(model)
    tokenizer, image_processor = load_visual_tokenizer(model.visual_tokenizer)
    collator = PixelDecoderDataCollator(
        pipeline,
        height=data.height,
        width=data.width,
        image_processor=image_processor,
        seed=args.seed,
        original_sizes=model.original_sizes,
    )
    return train_pixel_decoder(
        pipeline,
        args,
        load_training_data(data),
        collator,
        visual_tokenizer=tokenizer,
        validation_rows=load_validation_rows(data),
    )


def load_pixel_decoder(model: ModelArguments) -> Any:
    """The pixel decoder to train, as a pipeline."""
    scratch = (model.token_decoder, model.vae, model.unet_config)
    if model.pixel_decoder is not None and not any(scratch):
        return LavitPixelDecoderPipeline.from_pretrained(model.pixel_decoder, decoder=model.decoder)
    if model.pixel_decoder is not None or not all(scratch):
        raise SystemExit("Give either --pixel_decoder, or --token_decoder, --vae and --unet_config.")
    return build_pixel_decoder(
        LavitTokenDecoder.from_pretrained(model.token_decoder),
        AutoencoderKL.from_pretrained(model.vae),
        json.loads(Path(model.unet_config).read_text(encoding="utf-8")),
        json.loads(Path(model.scheduler_config).read_text(encoding="utf-8")) if model.scheduler_config else None,
    )


def load_visual_tokenizer(path: str | None) -> tuple[Any, Any]:
    """The frozen visual tokenizer and its image processor."""
    if path is None:
        return None, None
    return LavitVisualTokenizer.from_pretrained(path), LavitImageProcessorPil.from_pretrained(path)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
