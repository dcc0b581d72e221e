"""Stage 3: trains or fine-tunes a pixel decoder, which draws images from visual codes.

    python examples/train_pixel_decoder.py --dataset photos/ --pixel_decoder path/to/lavit --visual_tokenizer \
        path/to/lavit --output_dir out/pixel-decoder --max_steps 1000 --learning_rate 1e-5

On several devices: `accelerate launch examples/train_pixel_decoder.py ...`. `--config FILE.yaml` takes options
from a file, `--help` lists them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lavit_hf import LavitImageProcessorPil, LavitPixelDecoderPipeline, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.training import (
    PixelDecoderArguments,
    PixelDecoderDataCollator,
    PixelDecoderDataset,
    PixelDecoderTrainer,
    StreamArguments,
    build_pixel_decoder,
    exit_on_write_errors,
    load_rows,
    parse_script_arguments,
    replace_token_decoder,
)


@dataclass
class ModelArguments:
    """What to train: an existing pixel decoder, or a new one around a token decoder and a VAE."""

    pixel_decoder: str | None = field(default=None, metadata={"help": "A LaVIT, or a pixel decoder, to fine-tune."})
    decoder: str | None = field(default=None, metadata={"help": "Which one of a LaVIT: highres or lowres."})
    token_decoder: str | None = field(
        default=None,
        metadata={"help": "The token decoder of stage 1: from scratch, or for other codes than --pixel_decoder has."},
    )
    vae: str | None = field(default=None, metadata={"help": "From scratch: a trained AutoencoderKL."})
    unet_config: str | None = field(default=None, metadata={"help": "From scratch: a JSON file."})
    scheduler_config: str | None = field(default=None, metadata={"help": "From scratch: changes to it, a JSON file."})
    visual_tokenizer: str | None = field(
        default=None, metadata={"help": "A LaVIT, or a visual tokenizer; not needed if the dataset has codes."}
    )
    original_sizes: bool = field(default=False, metadata={"help": "SDXL: tell the U-Net the images' original sizes."})


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "A folder of images, one of save_to_disk, the name of a dataset, 'scenes' or 'emoji'."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split to validate on; by default none."})
    num_validation_rows: int = field(default=64, metadata={"help": "How many rows of it to use."})
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes' and 'emoji': how many to train on."})
    height: int | None = field(default=None, metadata={"help": "Height of the pictures; by default the model's."})
    width: int | None = field(default=None, metadata={"help": "Width of the pictures; by default the model's."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about corrupt images: skip or raise."})


def main(arguments: list[str] | None = None) -> PixelDecoderTrainer:
    """Trains; returns the trainer."""
    model_args, data_args, stream_args, args = parse_script_arguments(
        (ModelArguments, DataArguments, StreamArguments, PixelDecoderArguments), arguments, __doc__
    )
    torch.manual_seed(args.seed)  # for weights that start at random
    pipeline = load_pixel_decoder(model_args)
    visual_tokenizer, image_processor = load_visual_tokenizer(model_args.visual_tokenizer)
    trainer = PixelDecoderTrainer(
        pipeline,
        args,
        train_dataset=load_training_data(data_args, stream_args, args, visual_tokenizer),
        eval_dataset=load_validation_rows(data_args, stream_args.streaming, visual_tokenizer),
        data_collator=PixelDecoderDataCollator(
            pipeline,
            height=data_args.height,
            width=data_args.width,
            image_processor=image_processor,
            seed=args.seed,
            original_sizes=model_args.original_sizes,
        ),
        visual_tokenizer=visual_tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer


def load_pixel_decoder(model_args: ModelArguments) -> Any:
    """The pixel decoder to train, as a pipeline."""
    scratch = (model_args.token_decoder, model_args.vae, model_args.unet_config)
    if model_args.pixel_decoder is not None and not any(scratch[1:]):
        if model_args.scheduler_config is not None:
            raise SystemExit("--scheduler_config is for a pixel decoder from scratch: --pixel_decoder keeps its own.")
        pipeline = LavitPixelDecoderPipeline.from_pretrained(model_args.pixel_decoder, decoder=model_args.decoder)
        if model_args.token_decoder is not None:
            replace_token_decoder(pipeline, LavitTokenDecoder.from_pretrained(model_args.token_decoder))
        return pipeline
    if model_args.pixel_decoder is not None or not all(scratch):
        raise SystemExit(
            "Give either --pixel_decoder (and --token_decoder for other codes), or --token_decoder, --vae and "
            "--unet_config."
        )
    if model_args.decoder is not None:
        raise SystemExit("--decoder says which one of --pixel_decoder to fine-tune; from scratch there is one alone.")
    return build_pixel_decoder(
        LavitTokenDecoder.from_pretrained(model_args.token_decoder),
        AutoencoderKL.from_pretrained(model_args.vae),
        json.loads(Path(model_args.unet_config).read_text(encoding="utf-8")),
        json.loads(Path(model_args.scheduler_config).read_text(encoding="utf-8"))
        if model_args.scheduler_config
        else None,
    )


def load_visual_tokenizer(path: str | None) -> tuple[Any, Any]:
    """The frozen visual tokenizer and its image processor."""
    if path is None:
        return None, None
    return LavitVisualTokenizer.from_pretrained(path), LavitImageProcessorPil.from_pretrained(path)


def load_training_data(
    data_args: DataArguments, stream_args: StreamArguments, args: PixelDecoderArguments, visual_tokenizer: Any
) -> Any:
    """What to train on: a dataset, or what is read while training goes on."""
    if not stream_args.is_used:
        return load_split(data_args, data_args.train_split, visual_tokenizer)
    columns = (data_args.image_column, None)
    options = {"on_bad_sample": data_args.on_bad_sample, "num_scenes": data_args.num_scenes}
    return stream_args.load(
        args, data_args.dataset, data_args.train_split, *columns, visual_tokenizer=visual_tokenizer, **options
    )


def load_split(
    data_args: DataArguments, split: str, visual_tokenizer: Any, num_rows: int | None = None, streaming: bool = False
) -> PixelDecoderDataset:
    """A split of the dataset, or its first rows."""
    if data_args.dataset is None:
        raise SystemExit("Name the data: --dataset.")
    options = {"num_rows": num_rows, "streaming": streaming, "num_scenes": data_args.num_scenes}
    rows, root = load_rows(data_args.dataset, split, visual_tokenizer=visual_tokenizer, **options)
    return PixelDecoderDataset(rows, data_args.image_column, data_args.on_bad_sample, image_root=root)


def load_validation_rows(data_args: DataArguments, streaming: bool, visual_tokenizer: Any) -> list[dict[str, Any]]:
    """Samples held out for validation."""
    if data_args.validation_split is None:
        return []
    num_rows = data_args.num_validation_rows
    samples = load_split(data_args, data_args.validation_split, visual_tokenizer, num_rows, streaming)
    return [samples[index] for index in range(len(samples))]


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
