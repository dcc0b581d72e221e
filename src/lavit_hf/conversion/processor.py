"""Processor and generation config of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import GenerationConfig

from ..modeling.configuration_lavit import LavitConfig
from .errors import ConversionError
from .source import TEXT_TOKENIZER, OriginalCheckpoint
from .weight_files import read_json

if TYPE_CHECKING:
    from ..processing.processing_lavit import ImageTextProcessor


def build_processor(source: OriginalCheckpoint, config: LavitConfig) -> ImageTextProcessor:
    """Builds the processor, checks that the text tokenizer fits the language model, and finds a row for placeholders.

    All rows of the published embeddings are taken, but byte fallback leaves one unused: that of the unknown token.

    Args:
        source: The original checkpoint.
        config: The model's configuration. It gets the `image_token_id`.

    Returns:
        The processor, without a visual tokenizer.
    """
    # Imported here: importing the converter must not load the tokenizer and image libraries.
    from ..processing.image_processing_pil_lavit import LavitImageProcessorPil
    from ..processing.processing_lavit import ImageTextProcessor
    from ..processing.tokenization_lavit import LavitTokenizer, read_sentencepiece

    visual: Any = config.visual_tokenizer_config
    text: Any = config.text_config
    path = source.root / TEXT_TOKENIZER
    try:
        backend, special_tokens = read_sentencepiece(path)
        unknown_id = backend.token_to_id(special_tokens["unk_token"])
        tokenizer = LavitTokenizer.from_sentencepiece(path, visual.codebook_size, image_token_id=unknown_id)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    if tokenizer.boi_token_id != config.boi_token_id:
        raise ConversionError(
            f"{path} has {tokenizer.boi_token_id} tokens, but the language model's vocabulary "
            f"({text.vocab_size}) less {visual.codebook_size} codes, image start and image end leaves "
            f"{config.boi_token_id}."
        )
    _set_placeholder(config, unknown_id)
    height, width = visual.image_size
    image_processor = LavitImageProcessorPil(size={"height": height, "width": width})
    return ImageTextProcessor(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_length=visual.num_patches
    )


def _set_placeholder(config: LavitConfig, image_token_id: int) -> None:
    text: Any = config.text_config
    if getattr(text, "pad_token_id", None) == image_token_id:
        text.pad_token_id = None  # Early Llamas pad with it; here padding is the end of text, and it is masked.
    config.image_token_id = image_token_id
    try:
        config.validate()
    except StrictDataclassClassValidationError as error:
        raise ConversionError(f"The unknown token cannot be the placeholder of images: {error}") from error


def save_generation_config(source: OriginalCheckpoint, config: LavitConfig, folder: Path) -> None:
    """Writes the special ids for generation; sampling options of the language model alone do not carry over."""
    path = source.root / "language_model/generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    ids = {key: stored.get(key, getattr(config.text_config, key)) for key in ("bos_token_id", "eos_token_id")}
    eos = ids["eos_token_id"]
    padding = eos[0] if isinstance(eos, list) else eos
    GenerationConfig(**ids, pad_token_id=padding).save_pretrained(folder)
