"""Tiny Emu3, Janus and Chameleon, with an image and text in every prompt.

As in transformers' own tests of them: sizes, and that Emu3 and Chameleon are not set to train.
"""

import unittest
from typing import Any

import torch
from transformers import ChameleonConfig, Emu3Config, JanusConfig

VOCAB = 99
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VQ = {"base_channels": 32, "in_channels": 3}  # group norms of 32 groups


class PeerTester:
    batch_size = 7
    is_training = False
    image_token_id: int
    image_size: int
    tokens_per_image: int
    num_text_ids = 7

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.vocab_size, self.hidden_size = VOCAB, TEXT["hidden_size"]
        self.num_hidden_layers, self.num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
        self.seq_length = self.tokens_per_image + self.num_text_ids

    def get_config(self) -> Any:
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        image = torch.full((self.batch_size, self.tokens_per_image), self.image_token_id)
        text = torch.randint(40, VOCAB - 16, (self.batch_size, self.num_text_ids), generator=generator)
        input_ids = torch.cat([image, text], dim=1)
        size = (self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(size, generator=generator),
        }


class Emu3Tester(PeerTester):
    image_token_id, image_size, tokens_per_image = 3, 15, 12
    channel_multiplier, num_res_blocks = [1, 2, 1], 2

    def get_config(self) -> Emu3Config:
        names = {f"token{id}": id for id in range(VOCAB) if not 3 <= id < 25}
        names |= {"<image>": 3, "<|extra_200|>": 4} | {f"<|visual token{id:06d}|>": id for id in range(5, 25)}
        vq = {"codebook_size": 20, "temporal_downsample_factor": 1, "hidden_size": 32, "attn_resolutions": []}
        vq |= {"base_channels": 32, "channel_multiplier": self.channel_multiplier}
        return Emu3Config(text_config=TEXT, vq_config=vq, vocabulary_map=names)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {**inputs, "image_sizes": torch.tensor([[self.image_size] * 2] * self.batch_size)}


class ChameleonTester(PeerTester):
    image_token_id, image_size, tokens_per_image = 4, 10, 25

    def get_config(self) -> ChameleonConfig:
        names = {f"token{id}": id for id in range(VOCAB) if id != 4 and not 10 <= id < 15}
        names |= {"<image>": 4} | {f"IMGIMGB{chr(ord('A') + code)}Z": 10 + code for code in range(5)}
        vq = {**VQ, "embed_dim": 5, "num_embeddings": 5, "latent_channels": 5, "channel_multiplier": [1, 2]}
        return ChameleonConfig(**TEXT, vocabulary_map=names, vq_config=vq)


class JanusTester(PeerTester):
    image_token_id, image_size, tokens_per_image = 0, 20, 16
    is_training = True

    def get_config(self) -> JanusConfig:
        vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
        vision |= {"image_size": self.image_size, "patch_size": 5, "num_image_tokens": self.tokens_per_image}
        vision |= {"projection_dim": 32}
        vq = {**VQ, "embed_dim": 12, "num_embeddings": 12, "latent_channels": 12, "channel_multiplier": [1, 1]}
        vq |= {"projection_dim": 10, "image_token_embed_dim": 32}
        text = {"model_type": "llama", **TEXT, "pad_token_id": 1}
        return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=self.image_token_id)
