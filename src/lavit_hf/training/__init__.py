"""Training of every stage with `Trainer`, PEFT and accelerate. Needs `pip install lavit-hf[training]`.

Nothing here is imported before it is used, so that no stage needs what another one does.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "AutoencoderArguments": "autoencoder",
    "EpochCallback": "epoch_callback",
    "LavitDataCollator": "data_collator",
    "PixelDecoderArguments": "pixel_decoder",
    "PixelDecoderDataCollator": "pixel_decoder_collator",
    "TrainingDataset": "dataset",
    "VisualTokenizerCallback": "visual_tokenizer_callback",
    "VisualTokenizerDataCollator": "visual_tokenizer_collator",
    "build_pixel_decoder": "pixel_decoder_init",
    "freeze_for_language_modeling": "freezing",
    "get_lora_config": "lora",
    "load_tokenized_dataset": "tokenized_directory",
    "tokenize_dataset": "tokenize_dataset",
    "train_autoencoder": "autoencoder",
    "train_pixel_decoder": "pixel_decoder",
    "upcast_trained_weights": "lora",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
