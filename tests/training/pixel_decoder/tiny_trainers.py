"""Tiny runs of stage 3."""

from pathlib import Path

from lavit_hf.training.pixel_decoder.data import PixelDecoderDataset
from lavit_hf.training.pixel_decoder.pixel_decoder import PixelDecoderArguments, PixelDecoderTrainer
from tiny_pixel_decoders import build_pipeline, rows

OPTIONS = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def build_trainer(folder: Path, pipeline=None, collator=None, tokenizer=None, **options) -> PixelDecoderTrainer:
    """A trainer that is not to train."""
    pipeline = build_pipeline() if pipeline is None else pipeline
    args = PixelDecoderArguments(output_dir=str(folder), **{**OPTIONS, **options})
    return PixelDecoderTrainer(pipeline, args, PixelDecoderDataset(rows(16)), collator, tokenizer)
