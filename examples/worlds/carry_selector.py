"""Carries a selector over to an encoder that was trained further.

    python examples/worlds/carry_selector.py --visual_tokenizer out/lavit-scenes/selector/visual_tokenizer \
        --vision_model out/lavit-scenes/vision_encoder --output_dir out/lavit-scenes/carried

Once features tell where patches are, those of the background help to rebuild a picture about as much as those of
objects, and stage 1 keeps either. So the selector learns before, and then learns to decide the same from the features
of the encoder that was trained further. `--output_dir` gets a visual tokenizer with both, whose other parts are
random, for `train_tokenizer.py --new_codes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import HfArgumentParser

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer
from lavit_hf.data.worlds import find_world
from lavit_hf.training import exit_on_write_errors, load_visual_part

_NUM_MEASURED = 500  # scenes


@dataclass
class Arguments:
    """What to carry where."""

    visual_tokenizer: str = field(metadata={"help": "Whose selector to carry over."})
    vision_model: str = field(metadata={"help": "The encoder that was trained further."})
    output_dir: str = field(metadata={"help": "Where the new visual tokenizer goes."})
    world: str = field(default="scenes", metadata={"help": "What the pictures are of: scenes or emoji."})
    max_steps: int = field(default=350, metadata={"help": "Updates."})
    batch_size: int = field(default=64, metadata={"help": "Pictures per update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})


def pictures(args: Arguments, image_processor: Any) -> Iterator[torch.Tensor]:
    """Batches of pictures, `[batch, 3, height, width]`."""
    world = find_world(args.world)
    for step in range(args.max_steps):
        indices = range(step * args.batch_size, (step + 1) * args.batch_size)
        images = [world.render(world.sample_scene(world.splits[0], 0, index)) for index in indices]
        yield image_processor(images, return_tensors="pt")["pixel_values"]


def teach(
    teacher: LavitVisualTokenizer, student: LavitVisualTokenizer, args: Arguments, image_processor: Any
) -> float:
    """Trains the student's selector; returns how often both decide the same in the end."""
    selector = student.discrete.selector
    selector.requires_grad_(True)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_steps, pct_start=0.05)
    agreement = 0.0
    for pixel_values in pictures(args, image_processor):
        with torch.no_grad():
            is_kept = teacher.encode(pixel_values).keep_mask
            features = student.get_patch_features(pixel_values)
        keep, drop = selector(features).unbind(dim=-1)  # log-probabilities
        log_odds = keep - drop
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(log_odds, is_kept.float()).backward()
        optimizer.step()
        schedule.step()
        agreement = ((log_odds > 0) == is_kept).float().mean().item()
    return agreement


@torch.no_grad()
def kept_shares(tokenizer: LavitVisualTokenizer, args: Arguments, image_processor: Any) -> tuple[float, float]:
    """Which shares of the patches of objects, and of those of backgrounds, are kept in scenes that are new."""
    world = find_world(args.world)
    side = math.isqrt(tokenizer.config.num_patches)
    made = world.labeled_pictures("validation", 0, np.arange(_NUM_MEASURED), side, np.zeros(_NUM_MEASURED, bool))
    pixel_values = image_processor(list(made.pixels), return_tensors="pt")["pixel_values"]
    is_kept = torch.cat([tokenizer.encode(some).keep_mask for some in pixel_values.split(args.batch_size)]).numpy()
    return float(is_kept[made.is_object].mean()), float(is_kept[~made.is_object].mean())


def main(arguments: list[str] | None = None) -> None:
    """Carries the selector over."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    torch.manual_seed(0)
    teacher = LavitVisualTokenizer.from_pretrained(args.visual_tokenizer).eval()
    image_processor = LavitImageProcessorPil.from_pretrained(args.visual_tokenizer)
    student = LavitVisualTokenizer(teacher.config).eval()
    student.vision_model.load_state_dict(load_visual_part(args.vision_model).state_dict(), strict=False)
    student.discrete.selector.load_state_dict(teacher.discrete.selector.state_dict())
    agreement = teach(teacher, student, args, image_processor)
    print(f"Of the patches, {100 * agreement:.1f} % are kept or dropped as before.")
    of_objects, of_backgrounds = kept_shares(student, args, image_processor)
    print(f"Kept are {100 * of_objects:.1f} % of objects' patches, {100 * of_backgrounds:.1f} % of backgrounds'.")
    student.save_pretrained(args.output_dir)
    image_processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
