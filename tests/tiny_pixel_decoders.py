"""Tiny pixel decoders with random weights, and pictures to train them on."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from lavit_hf import LavitTokenDecoder, LavitTokenDecoderConfig, LavitVisualTokenizer
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from lavit_hf.training.pixel_decoder.pixel_decoder import build_pixel_decoder

CODEBOOK_SIZE = 24  # as in tiny_models
NUM_QUERIES = 16
IMAGE_SIZE = 16
EPSILON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def build_token_decoder(**overrides) -> LavitTokenDecoder:
    values = {
        "codebook_size": CODEBOOK_SIZE,
        "codebook_dim": 6,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 24,
        "num_queries": NUM_QUERIES,
        "output_size": 16,
        "cross_attention_dims": [12],
        "pooled_size": None,
        "initializer_range": 0.2,
    }
    return LavitTokenDecoder(LavitTokenDecoderConfig(**{**values, **overrides}))


@torch.no_grad()
def share_codes(token_decoder: LavitTokenDecoder, visual_tokenizer: LavitVisualTokenizer) -> LavitTokenDecoder:
    """Gives a token decoder the codebook of a visual tokenizer, as stage 1 does."""
    token_decoder.codebook.weight.copy_(visual_tokenizer.discrete.quantizer.codebook.weight)
    return token_decoder


def build_vae(**overrides) -> AutoencoderKL:
    values = {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "sample_size": IMAGE_SIZE,
    }
    return AutoencoderKL(**{**values, **overrides})


def unet_config(highres: bool = False) -> dict:
    config = {
        "sample_size": IMAGE_SIZE // 2,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    }
    if highres:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 10 + 6 * 4,
        }
    return config


def build_pipeline(highres: bool = False, seed: int = 0, scheduler: dict | None = None) -> LavitPixelDecoderPipeline:
    """The low-resolution one has stored rows of a negative condition, as the published one."""
    torch.manual_seed(seed)
    heads = {"pooled_size": 10} if highres else {"num_negative_tokens": 5}
    decoder = build_token_decoder(**heads)
    if decoder.negative_condition is not None:
        decoder.negative_condition.normal_()
    pipeline = build_pixel_decoder(decoder, build_vae(), unet_config(highres), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), seed: int = 0) -> list[Image.Image]:
    """A block of one color on another one; size is (width, height)."""
    generator = np.random.default_rng(seed)
    width, height = size
    images = []
    for _ in range(count):
        array = np.empty((height, width, 3), np.uint8)
        array[:] = generator.integers(0, 256, 3)
        top, left = generator.integers(0, (height // 2, width // 2))
        array[top : top + height // 2, left : left + width // 2] = generator.integers(0, 256, 3)
        images.append(Image.fromarray(array))
    return images


def rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of a dataset, with 1 to 8 codes each."""
    generator = np.random.default_rng(seed)
    return [
        {"image": image, "codes": [generator.integers(0, CODEBOOK_SIZE, generator.integers(1, 9)).tolist()]}
        for image in pictures(count, seed=seed)
    ]


def build_safety_checker(threshold: float) -> dict[str, Any]:
    """The parts of a pipeline that look for what must not be shown: all drawings if the threshold is below -1."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 12,
    }
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12)).eval()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    extractor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"safety_checker": checker, "feature_extractor": extractor}
