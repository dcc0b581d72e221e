"""Training of every stage with `Trainer` and PEFT. Needs `pip install lavit-hf[training]`.

Nothing here is imported before it is used, so that no stage needs what another one does. Some names are of other parts
of this package: what scripts that train need beside it.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "AutoencoderArguments": "pixel_decoder.autoencoder",
    "AutoencoderTrainer": "pixel_decoder.autoencoder",
    "CheckpointCallback": "trainer_checkpoints",
    "EpochCallback": "dataset",
    "FiniteGradientsCallback": "trainer_checkpoints",
    "GenerationMetrics": "language_model.generation_metrics",
    "ImageDataCollator": "pixel_decoder.data",
    "LanguageModelingLoss": "language_model.preparation",
    "LavitDataCollator": "language_model.data_collator",
    "MixturePart": "streaming",
    "PEAK_SHARE": "planning",
    "PixelDecoderArguments": "pixel_decoder.pixel_decoder",
    "PixelDecoderDataCollator": "pixel_decoder.data",
    "PixelDecoderDataset": "pixel_decoder.data",
    "PixelDecoderTrainer": "pixel_decoder.pixel_decoder",
    "StreamArguments": "streaming",
    "StreamSource": "streaming",
    "StreamTrainer": "streaming",
    "StreamedTrainingDataset": "streaming",
    "TrainingDataset": "dataset",
    "TrainingPlan": "planning",
    "ValidationPictures": "validation_pictures",
    "VisualTokenizerCallback": "visual_tokenizer",
    "VisualTokenizerDataCollator": "visual_tokenizer",
    "VisualTokenizerTrainer": "visual_tokenizer",
    "assemble": "assembly",
    "build_image_processor": ".composition",
    "build_pixel_decoder": "pixel_decoder.pixel_decoder",
    "build_vision_model": ".modeling.modeling_lavit_visual_tokenizer",
    "copy_pixel_decoders": ".pipelines.pixel_decoder_files",
    "draw_captions": "validation_pictures",
    "draw_kept_patches": "validation_pictures",
    "exit_on_write_errors": ".utils.atomic_files",
    "find_trainer_checkpoint": "trainer_checkpoints",
    "first_pictures": "validation_pictures",
    "freeze_for_language_modeling": "language_model.preparation",
    "get_lora_config": "language_model.adapters",
    "init_code_embeddings": "language_model.preparation",
    "init_merger": "language_model.preparation",
    "init_projector": "language_model.preparation",
    "is_sharded_run": ".utils.distributed",
    "load_data": ".data.loading",
    "load_rows": "streaming",
    "load_stream": "streaming",
    "load_tokenized_dataset": "precompute_codes.tokenize_dataset",
    "load_visual_part": ".composition",
    "make_scenes": ".data.scenes",
    "merge_adapter": "language_model.adapters",
    "parse_script_arguments": "script_arguments",
    "plan_training": "planning",
    "read_recipe": "script_arguments",
    "replace_token_decoder": "pixel_decoder.pixel_decoder",
    "sample_seed": ".utils.seeds",
    "sample_uniform": ".utils.seeds",
    "save_adapter_card": "language_model.adapters",
    "tokenize_dataset": "precompute_codes.tokenize_dataset",
    "train_autoencoder": "pixel_decoder.autoencoder",
    "train_pixel_decoder": "pixel_decoder.pixel_decoder",
    "upcast_trained_weights": "language_model.adapters",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
