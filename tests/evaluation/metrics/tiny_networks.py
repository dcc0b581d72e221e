"""Random networks on disk, in the form in which users give the real ones."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer


def save_tiny_clip(folder: Path) -> Path:
    """A CLIP checkpoint that tells colors and letters apart, by chance."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=24)
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    vision = {"image_size": 16, "patch_size": 8}
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, **width}, vision_config={**vision, **width}, projection_dim=8)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


class MeanColor(torch.nn.Module):
    """Called like the public InceptionV3; its three features are an image's mean color."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if not return_features:
            return images
        return images.float().mean(dim=[2, 3])


def save_mean_color(path: Path) -> Path:
    torch.jit.script(MeanColor()).save(str(path))
    return path
