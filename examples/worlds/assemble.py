"""Puts the trained parts together as one Hub-style directory, in half precision.

    python examples/worlds/assemble.py --trained out/lavit-scenes --output_dir out/lavit-scenes/checkpoint

Weights are stored as float16 and loaded as float32, which the configuration says: on a CPU half precision is slow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, HfArgumentParser

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitPixelDecoderPipeline
from lavit_hf.training import exit_on_write_errors


@dataclass
class Arguments:
    """What to put together."""

    trained: Path = field(metadata={"help": "Directory of train.py."})
    output_dir: Path = field(metadata={"help": "Directory to write."})
    guidance: float = field(default=1.5, metadata={"help": "How much drawings follow their prompts by default."})
    decoder_guidance: float | None = field(
        default=None, metadata={"help": "How much pixels follow the codes by default; if not given, as the original."}
    )
    without_code: bool = field(
        default=False,
        metadata={"help": "Leave out the code that checkpoints bring to where lavit-hf is not installed."},
    )


def main(arguments: list[str] | None = None) -> None:
    """Writes the checkpoint."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    model = LavitForConditionalGeneration.from_pretrained(args.trained / "lavit")
    processor = ImageTextProcessor.from_pretrained(args.trained / "lavit")
    longer = args.trained / "pixel_decoder_longer"  # of recipes that train it in two parts
    pixel_decoder = longer if longer.exists() else args.trained / "pixel_decoder"
    pipeline = LavitPixelDecoderPipeline.from_pretrained(pixel_decoder)
    pipeline.token_decoder.config.default_guidance_scale = args.decoder_guidance
    pipeline.register_to_config(
        visual_token_offset=model.config.visual_token_offset, eoi_token_id=model.config.eoi_token_id
    )
    end = processor.tokenizer.eos_token_id
    # Captions and answers are short and certain: no beams, and answers of one word.
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, num_beams=1, min_new_tokens=1, drawing_guidance_scale=args.guidance
    )
    model.half().save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(args.output_dir)
    for path in (args.output_dir / "config.json", args.output_dir / "token_decoder" / "config.json"):
        load_as_float32(path)
    for path in args.output_dir.rglob("config.json"):
        forget(path, "_name_or_path")  # folders of this machine, which mean nothing elsewhere
    if args.without_code:
        for path in args.output_dir.rglob("*.py"):
            path.unlink()
        for path in args.output_dir.rglob("*config.json"):
            forget(path, "auto_map")


def load_as_float32(path: Path) -> None:
    """Has `from_pretrained` load float32, whatever the files hold, if it is not told otherwise."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["dtype"] = "float32"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def forget(path: Path, name: str) -> None:
    """Removes a key, wherever it is in a JSON file."""
    values = json.loads(
        path.read_text(encoding="utf-8"), object_hook=lambda found: {k: v for k, v in found.items() if k != name}
    )
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
