"""Tiny vision encoders, language models and tokenizers with random weights, to build new LaVITs of."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# A whole LaVIT with random weights and its processor, for images of 56 pixels.
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "lavit-tiny-random"
TEXT_VOCAB = 320
CODES = {"codebook_size": 24, "codebook_dim": 6, "merger_num_layers": 2}

_TEXT = {
    "vocab_size": TEXT_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": TEXT_VOCAB}
_TEXT_OVERRIDES = {
    "gpt2": {**_GPT2, "bos_token_id": 2, "eos_token_id": 2, "initializer_range": 0.2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gemma": {"head_dim": 8},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def text_config(model_type: str = "llama", **overrides):
    base = {} if model_type == "gpt2" else _TEXT
    return AutoConfig.for_model(model_type, **{**base, **_TEXT_OVERRIDES.get(model_type, {}), **overrides})


def vision_config(model_type: str = "vit", **overrides):
    return AutoConfig.for_model(model_type, **{**_VISION, **overrides})


def build_text_model(model_type: str = "llama", **overrides) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(text_config(model_type, **overrides)).eval()


def build_vision_model(model_type: str = "vit", **overrides) -> PreTrainedModel:
    torch.manual_seed(2)
    return AutoModel.from_config(vision_config(model_type, **overrides)).eval()


_SENTENCES = ["a red circle above a blue square", "a green star left of a red circle"] * 4


def build_text_tokenizer(texts: Sequence[str] = _SENTENCES, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE; by default with fewer ids than the language models have rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


def save_text(folder: Path, model_type: str = "llama", **overrides) -> Path:
    """A language model's checkpoint with its tokenizer."""
    build_text_model(model_type, **overrides).save_pretrained(folder)
    build_text_tokenizer().save_pretrained(folder)
    return folder


def save_vision(folder: Path, model_type: str = "vit", **overrides) -> Path:
    """A vision encoder's checkpoint with its image processor."""
    build_vision_model(model_type, **overrides).save_pretrained(folder)
    save_image_processor(folder)
    return folder


def save_dual(folder: Path, model_type: str) -> Path:
    """A checkpoint of CLIP, SigLIP or BLIP-2, which have a vision encoder inside."""
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    overrides = {"vision_config": _VISION, "text_config": {**text, "num_attention_heads": 2}}
    if model_type == "blip-2":
        overrides["text_config"] = {"model_type": "opt", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
        overrides["text_config"] |= {"ffn_dim": 48, "num_attention_heads": 2, "word_embed_proj_dim": 32}
        overrides["qformer_config"] = {**text, "num_attention_heads": 2, "encoder_hidden_size": 32}
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.for_model(model_type, **overrides)).save_pretrained(folder)
    save_image_processor(folder)
    return folder


def save_image_processor(folder: Path) -> None:
    """SigLIP's: statistics other than CLIP's, and resizing other than LaVIT's default."""
    values = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    values |= {"resample": 2, "rescale_factor": 1 / 255, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def picture_rows(count: int) -> list[dict]:
    """Pictures with texts of different lengths, every fifth row without a picture."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return [
        {
            "image": None if index % 5 == 3 else Image.fromarray(pixels[index].numpy()).resize((56, 56)),
            "text": "cat dog " * (1 + index * 7 % 4) + str(index),
        }
        for index in range(count)
    ]
