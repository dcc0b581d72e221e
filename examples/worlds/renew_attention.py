"""Gives the language model of a LaVIT new attention; all else stays as it was trained.

    python examples/worlds/renew_attention.py --model out/lavit-emoji-small/lavit --output_dir out/renewed

A language model that has learned to write captions in one order of places finds what is at a place, and hardly learns
any more to find what a word names. With random attention it learns that from layouts in any order
(`make_dataset.py --listing_share 1`) in a few hundred updates, faster than a model from nothing, as embeddings, MLPs
and head still know words and codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import HfArgumentParser

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training import exit_on_write_errors

_ATTENTION = "self_attn"  # as transformers' language models name it


@dataclass
class Arguments:
    """Whose attention to renew."""

    model: str = field(metadata={"help": "A LaVIT, as train_lm.py saves it."})
    output_dir: str = field(metadata={"help": "Where the model with new attention goes."})
    seed: int = field(default=0, metadata={"help": "Of the random weights."})


def renew_attention(model: LavitForConditionalGeneration) -> int:
    """Draws the weights of attention in the language model anew, in place.

    Returns:
        How many numbers are new.

    Raises:
        SystemExit: If none of its modules is called as attention usually is.
    """
    language_model = model.model.language_model
    renewed = 0
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear) and _ATTENTION in name.split("."):
            nn.init.normal_(module.weight, std=model.config.text_config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            renewed += sum(parameter.numel() for parameter in module.parameters())
    if not renewed:
        raise SystemExit(f"{type(language_model).__name__} has no linear layers in modules called {_ATTENTION}.")
    return renewed


def main(arguments: list[str] | None = None) -> None:
    """Writes the model and its processor."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    torch.manual_seed(args.seed)
    model = LavitForConditionalGeneration.from_pretrained(args.model)
    processor = ImageTextProcessor.from_pretrained(args.model)
    renewed = renew_attention(model)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {renewed / 1e6:.1f} M numbers of attention are new")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
