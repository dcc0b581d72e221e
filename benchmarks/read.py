"""Seconds to caption a picture on rows without empty placeholders, against rows with all of them, in the same run.

    python benchmarks/read.py [--kept 100] [--tokens 16] [--repeats 5]

The baseline passes a stopping criterion that stops nothing. `generate` then keeps the width of the prompt, as somebody
looks at its ids: one position per patch. About 100M parameters in the decoder layers; the visual tokenizer is tiny, as
it costs the same on both sides.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from draw import build, seconds

from lavit_hf.modeling.modeling_lavit import LavitImageFeatures

PATCHES = 256


def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """A stopping criterion that stops nothing."""
    return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=100, help="patches kept of an image, of 256")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens per image")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    model = build()[0]
    config = model.config
    print(f"{arguments.kept} of {PATCHES} patches, torch {torch.__version__}, {torch.get_num_threads()} threads")
    rng = torch.Generator().manual_seed(0)
    for batch_size, beams in ((1, 1), (1, 5), (4, 1)):
        image = [config.boi_token_id, *[config.image_token_id] * PATCHES, config.eoi_token_id]
        prompts = torch.tensor([[*image, 5, 6, 7, 8]] * batch_size)
        features = torch.randn(batch_size * arguments.kept, config.text_config.hidden_size, generator=rng)
        options = {
            "input_ids": prompts,
            "attention_mask": torch.ones_like(prompts),
            "min_new_tokens": arguments.tokens,
            "max_new_tokens": arguments.tokens,
            "num_beams": beams,
        }

        def caption(features: torch.Tensor = features, **options: Any) -> torch.Tensor:
            images = LavitImageFeatures(pooler_output=list(features.split(arguments.kept)))
            return model.generate(**options, mm_encoder_outputs={"image": images})

        functions = [partial(caption, **options), partial(caption, **options, stopping_criteria=[never])]
        is_same = torch.equal(*(function() for function in functions))
        ours, theirs = seconds(functions, arguments.repeats)
        print(
            f"batch {batch_size}, {beams} beams: short rows {ours:.2f} s, whole rows {theirs:.2f} s, "
            f"ratio {theirs / ours:.2f}x, same tokens: {is_same}"
        )


if __name__ == "__main__":
    main()
