"""Image processor and tokenizer of a new LaVIT, out of those of a vision encoder and a language model."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from ..modeling.configuration_lavit import LavitConfig
from .image_processing_pil_lavit import LavitImageProcessorPil
from .tokenization_lavit import LavitTokenizer

Source = str | os.PathLike | None
# What the encoder was trained with. Its sizes and crops are not taken over: LaVIT sees whole pictures, squashed.
_STATISTICS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")


def resolve_config(config: Any, vision: Source, text: Source, **kwargs: Any) -> LavitConfig:
    """The configuration that a processor has to fit: that of a model, or one made as the model's is.

    Raises:
        TypeError: If `config` is neither a configuration nor a model.
        ValueError: If there is nothing to make one of, or values are given beside a configuration.
    """
    if config is None:
        if vision is None or text is None:
            raise ValueError("Pass `config=model.config`, or both the vision model and the language model.")
        return LavitConfig.from_vision_text_configs(
            AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(text), **kwargs
        )
    config = getattr(config, "config", config)
    if not isinstance(config, LavitConfig):
        raise TypeError(f"`config` must be a LavitConfig or a model that has one, got {type(config).__name__}.")
    if kwargs:
        raise ValueError(f"Got both `config` and {', '.join(sorted(kwargs))}, which it holds already.")
    return config


def build_image_processor(source: Any, config: LavitConfig) -> LavitImageProcessorPil:
    """LaVIT's image processor with the statistics of a vision encoder's own.

    Args:
        source: The vision encoder's image processor, or its directory or Hub id.
        config: Its vision encoder gives the image size.

    Raises:
        ValueError: If there is no image processor.
    """
    if source is None:
        raise ValueError("Pass the vision model's directory or Hub id, or `image_processor`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoImageProcessor.from_pretrained(source)
    values = {name: getattr(source, name, None) for name in _STATISTICS}
    height, width = config.visual_tokenizer_config.image_size
    return LavitImageProcessorPil(
        size={"height": height, "width": width},
        **{name: value for name, value in values.items() if value is not None},
    )


def build_tokenizer(source: Any, config: LavitConfig) -> LavitTokenizer:
    """The language model's tokenizer with the visual vocabulary behind all rows of its embedding table.

    Args:
        source: The text tokenizer, or its directory or Hub id.
        config: Its ids.

    Raises:
        ValueError: If there is no tokenizer, or it has more ids than the language model.
    """
    if source is None:
        raise ValueError("Pass the language model's directory or Hub id, or `tokenizer`.")
    if isinstance(source, (str, os.PathLike)):
        source = AutoTokenizer.from_pretrained(source)
    if isinstance(source, LavitTokenizer) or not isinstance(source, PreTrainedTokenizerBase):
        raise ValueError(f"Expected a text tokenizer of transformers, got {type(source).__name__}.")
    last_id = max(source.get_vocab().values())
    if last_id >= config.boi_token_id:
        raise ValueError(
            f"The text tokenizer has ids up to {last_id}, but the language model embeds {config.boi_token_id} only. "
            "Resize its embeddings first (`resize_token_embeddings`), or use its own tokenizer."
        )
    return LavitTokenizer.from_text_tokenizer(
        source,
        config.visual_tokenizer_config.codebook_size,
        text_vocab_size=config.boi_token_id,
        image_token_id=config.image_token_id,
    )
