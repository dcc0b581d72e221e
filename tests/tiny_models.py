"""Tiny configurations with random weights, for tests that need no reference numbers."""

import torch

from lavit_hf import (
    LavitConfig,
    LavitForConditionalGeneration,
    LavitVisualTokenizer,
    LavitVisualTokenizerConfig,
)

NUM_PATCHES = 16
TEXT_VOCAB = 90
CODEBOOK_SIZE = 24


def visual_tokenizer_config(**overrides) -> LavitVisualTokenizerConfig:
    values = {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": 0.2,
        },
        "merger_num_layers": 2,
        "merger_num_heads": 2,
        "merger_intermediate_size": 40,
        "codebook_size": CODEBOOK_SIZE,
        "codebook_dim": 6,
        "initializer_range": 0.2,
    }
    return LavitVisualTokenizerConfig(**{**values, **overrides})


def text_config(model_type: str = "llama", **overrides) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": TEXT_VOCAB + 2 + CODEBOOK_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **overrides,
    }


def lavit_config(visual: dict | None = None, **text_overrides) -> LavitConfig:
    return LavitConfig(
        text_config=text_config(**text_overrides),
        visual_tokenizer_config=visual_tokenizer_config(**(visual or {})).to_dict(),
    )


def build_model(seed: int = 0, **kwargs) -> LavitForConditionalGeneration:
    torch.manual_seed(seed)
    model = LavitForConditionalGeneration(lavit_config(**kwargs)).eval()
    spread_selector(model.visual_tokenizer)
    return model


def build_visual_tokenizer(seed: int = 0, **overrides) -> LavitVisualTokenizer:
    torch.manual_seed(seed)
    tokenizer = LavitVisualTokenizer(visual_tokenizer_config(**overrides)).eval()
    spread_selector(tokenizer)
    return tokenizer


@torch.no_grad()
def spread_selector(tokenizer: LavitVisualTokenizer, pixels: torch.Tensor | None = None) -> None:
    """Makes random selectors keep some patches of every image and drop others."""
    pixels = random_pixels(64, seed=1234) if pixels is None else pixels
    features = tokenizer.get_patch_features(pixels)
    for branch in (tokenizer.discrete, tokenizer.continuous):
        if branch is not None:
            log_probs = branch.selector(features)
            branch.selector.out_proj_3.bias[0] -= (log_probs[..., 0] - log_probs[..., 1]).median()


def random_pixels(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make_prompts(
    model: LavitForConditionalGeneration, rows: list[list], lengths: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """Left-padded ids of rows such as `["image", [5, 6], "image", [7]]`.

    Args:
        model: Its configuration gives the ids.
        rows: Parts of each prompt.
        lengths: Placeholders of every image in order; one per patch by default (light form).
    """
    config, remaining, prompts = model.config, iter(lengths or []), []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if part == "image":
                count = NUM_PATCHES if lengths is None else next(remaining)
                ids += [config.boi_token_id, *[config.image_token_id] * count, config.eoi_token_id]
            else:
                ids += part
        prompts.append(ids)
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[2] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


# One image, several images and none; the images differ in their number of tokens.
ROWS = [["image", [5, 6, 7]], [[8], "image", [9], "image", [10, 11, 12, 13]], [[14, 15]]]
NUM_IMAGES = 3


def attached_inputs(model, pixels: torch.Tensor, rows: list[list] = ROWS) -> dict[str, torch.Tensor]:
    """Inputs as a processor with a visual tokenizer gives them."""
    with torch.no_grad():
        embedded = model.visual_tokenizer.embed(pixels)
    counts = embedded.num_tokens.tolist()
    assert len(set(counts)) == len(counts), "images of different lengths test more"
    return {**make_prompts(model, rows, counts), "image_features": embedded.features}


def light_inputs(model, pixels: torch.Tensor, rows: list[list] = ROWS) -> dict[str, torch.Tensor]:
    """Inputs as a processor without a visual tokenizer gives them."""
    return {**make_prompts(model, rows), "pixel_values": pixels}
