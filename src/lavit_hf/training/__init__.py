"""Training of every stage with `Trainer`, PEFT and accelerate. Needs `pip install lavit-hf[training]`.

Nothing here is imported before it is used, so that no stage needs what another one does.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "AutoencoderArguments": "pixel_decoder.autoencoder",
    "EpochCallback": "epoch_callback",
    "GenerationMetrics": "language_model.generation_metrics",
    "LanguageModelingLoss": "language_model.loss",
    "LavitDataCollator": "language_model.data_collator",
    "PixelDecoderArguments": "pixel_decoder.task",
    "PixelDecoderDataCollator": "pixel_decoder.collator",
    "TrainingDataset": "dataset",
    "VisualTokenizerCallback": "visual_tokenizer.callback",
    "VisualTokenizerDataCollator": "visual_tokenizer.collator",
    "assemble": "assembly",
    "build_pixel_decoder": "pixel_decoder.building",
    "freeze_for_language_modeling": "language_model.freezing",
    "get_lora_config": "language_model.lora",
    "init_code_embeddings": "language_model.initialization",
    "init_merger": "language_model.initialization",
    "init_projector": "language_model.initialization",
    "load_tokenized_dataset": "tokenization.tokenize_dataset",
    "merge_adapter": "language_model.adapters",
    "tokenize_dataset": "tokenization.tokenize_dataset",
    "train_autoencoder": "pixel_decoder.autoencoder",
    "train_pixel_decoder": "pixel_decoder.task",
    "upcast_trained_weights": "language_model.lora",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
