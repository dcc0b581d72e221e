"""Visual tokens per second with guidance in one batch, against transformers' own guidance, in the same run.

    python benchmarks/draw.py [--tokens 64] [--repeats 3]

The baseline is a plain `LlamaForCausalLM` with the same random weights and transformers' `guidance_scale`, which runs
a second forward pass per token and computes the whole head twice. About 100M parameters in the decoder layers, and the
full vocabulary of 48,386 ids.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_hf import LavitConfig, LavitForConditionalGeneration

TEXT_VOCAB, CODEBOOK_SIZE = 32000, 16384


def build() -> tuple[LavitForConditionalGeneration, LlamaForCausalLM]:
    """A LaVIT with a tiny visual tokenizer, and its language model as a plain Llama that shares the weights."""
    text_config = LlamaConfig(
        vocab_size=TEXT_VOCAB + 2 + CODEBOOK_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        max_position_embeddings=512,
        pad_token_id=2,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LavitConfig(
        text_config=text_config.to_dict(),
        visual_tokenizer_config={
            "vision_config": {"model_type": "blip_2_vision_model", **vision},
            "merger_num_layers": 1,
            "merger_num_heads": 2,
            "merger_intermediate_size": 64,
            "codebook_size": CODEBOOK_SIZE,
        },
    )
    torch.manual_seed(0)
    model = LavitForConditionalGeneration(config).eval()
    plain = LlamaForCausalLM(text_config).eval()
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    return model, plain


def seconds(functions: list[Callable[[], torch.Tensor]], repeats: int) -> list[float]:
    """Best time of each, measured in turns so that all see the same machine; the first round warms up."""
    best = [float("inf")] * len(functions)
    for run in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if run > 0:
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens per image")
    parser.add_argument("--prompt", type=int, default=16, help="text tokens per prompt")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    model, plain = build()
    layers = sum(parameter.numel() for parameter in plain.model.layers.parameters())
    print(
        f"{layers / 1e6:.0f}M parameters in the layers, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    length = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens, "do_sample": False}
    start, end = model.config.boi_token_id, model.config.eoi_token_id
    suppressed = list(range(end))
    for batch_size in (1, 4):
        text = torch.randint(3, TEXT_VOCAB, (batch_size, arguments.prompt), generator=torch.Generator().manual_seed(0))
        prompts = torch.cat([text, torch.full((batch_size, 1), start)], dim=-1)
        mask = torch.ones_like(prompts)

        def one_batch(prompts: torch.Tensor = prompts, mask: torch.Tensor = mask) -> torch.Tensor:
            return model.generate(
                prompts, attention_mask=mask, generation_mode="image", guidance_scale=arguments.scale, **length
            )

        def two_passes(prompts: torch.Tensor = prompts, mask: torch.Tensor = mask) -> torch.Tensor:
            return plain.generate(
                prompts,
                attention_mask=mask,
                guidance_scale=arguments.scale,
                negative_prompt_ids=prompts[:, -1:],
                negative_prompt_attention_mask=mask[:, -1:],
                suppress_tokens=suppressed,
                eos_token_id=end,
                **length,
            )

        is_same = torch.equal(one_batch(), two_passes())
        ours, theirs = seconds([one_batch, two_passes], arguments.repeats)
        total = batch_size * arguments.tokens
        print(
            f"batch {batch_size}: one batch {total / ours:.1f} tokens/s, two passes {total / theirs:.1f} tokens/s, "
            f"ratio {theirs / ours:.2f}x, same tokens: {is_same}"
        )


if __name__ == "__main__":
    main()
