"""Tiny models and their inputs, in the form that `ModelTesterMixin` asks for. It reads attributes, too."""

import unittest
from typing import Any

import torch

from lavit_hf import LavitConfig, LavitTokenDecoderConfig, LavitVisualTokenizerConfig
from tiny_models import NUM_PATCHES, TEXT_VOCAB, lavit_config, random_pixels, visual_tokenizer_config

# Some tests of attention make rows of random ids up to this number; such rows would have no image.
BATCH_SIZE = 7


class VisualTokenizerTester:
    batch_size = BATCH_SIZE
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.vision_config.num_hidden_layers
        self.num_attention_heads = config.vision_config.num_attention_heads
        self.seq_length = NUM_PATCHES + 1  # patches and the encoder's class token

    def get_config(self) -> LavitVisualTokenizerConfig:
        return visual_tokenizer_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[LavitVisualTokenizerConfig, dict[str, Any]]:
        return self.get_config(), {"pixel_values": random_pixels(self.batch_size)}


class TokenDecoderTester:
    batch_size = BATCH_SIZE
    is_training = True
    codes_per_image = 5

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_layers
        self.seq_length = config.num_queries

    def get_config(self) -> LavitTokenDecoderConfig:
        return LavitTokenDecoderConfig(
            codebook_size=24,
            codebook_dim=6,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=24,
            num_queries=NUM_PATCHES,
            output_size=16,
            cross_attention_dims=[8, 4],
            pooled_size=12,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LavitTokenDecoderConfig, dict[str, Any]]:
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(config.codebook_size, (self.batch_size * self.codes_per_image,), generator=generator)
        return config, {"codes": codes, "num_tokens": torch.tensor([self.codes_per_image] * self.batch_size)}


class LanguageModelTester:
    """Prompts of an image, then text. Subclasses say in which form the image is there."""

    batch_size = BATCH_SIZE
    is_training = True
    num_text_ids = 4
    tokens_per_image: int

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        text = self.get_config().text_config
        self.vocab_size = text.vocab_size
        self.hidden_size = text.hidden_size
        self.num_hidden_layers = text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.seq_length = self.tokens_per_image + 2 + self.num_text_ids

    def get_config(self) -> LavitConfig:
        return lavit_config()

    def image_inputs(self) -> dict[str, torch.Tensor]:
        return {}

    def image_ids(self, config: LavitConfig) -> list[int]:
        return [config.image_token_id] * self.tokens_per_image

    def prepare_config_and_inputs_for_common(self) -> tuple[LavitConfig, dict[str, Any]]:
        config = self.get_config()
        image = torch.tensor([[config.boi_token_id, *self.image_ids(config), config.eoi_token_id]])
        text = torch.randint(
            3, TEXT_VOCAB, (self.batch_size, self.num_text_ids), generator=torch.Generator().manual_seed(0)
        )
        input_ids = torch.cat([image.expand(self.batch_size, -1), text], dim=1)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **self.image_inputs()}


class LightTester(LanguageModelTester):
    """One placeholder per patch; the model selects."""

    tokens_per_image = NUM_PATCHES

    def image_inputs(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": random_pixels(self.batch_size)}


class AttachedTester(LanguageModelTester):
    """As many placeholders as the processor has found tokens; one, because tests take as many rows of all inputs."""

    tokens_per_image = 1

    def image_inputs(self) -> dict[str, torch.Tensor]:
        shape = self.batch_size * self.tokens_per_image, self.get_config().visual_tokenizer_config.hidden_size
        return {"image_features": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


class DiscreteTester(LanguageModelTester):
    """Codes, as ids of the vocabulary."""

    tokens_per_image = 5

    def image_ids(self, config: LavitConfig) -> list[int]:
        return [config.visual_token_offset + code for code in range(self.tokens_per_image)]
