"""LaVIT for the Hugging Face ecosystem: one language model that reads images and writes them as words.

Importing the package registers its classes with transformers' Auto classes.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from .auto import register_auto_classes
from .modeling.cache_lavit import LavitDynamicCache
from .modeling.configuration_lavit import (
    LavitConfig,
    LavitPreTrainingConfig,
    LavitTokenDecoderConfig,
    LavitVisualTokenizerConfig,
)
from .modeling.modeling_lavit import LavitForConditionalGeneration, LavitModel, LavitPreTrainedModel
from .modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from .modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer, LavitVisualTokenizerOutput
from .pipelines import __all__ as _pipelines
from .processing.image_processing_lavit import LavitImageProcessor
from .processing.image_processing_pil_lavit import LavitImageProcessorPil
from .processing.processing_lavit import ImageTextProcessor
from .processing.tokenization_lavit import LavitTokenizer

__version__ = "0.2.0"

__all__ = [
    "ImageTextProcessor",
    "LavitConfig",
    "LavitDynamicCache",
    "LavitForConditionalGeneration",
    "LavitImageProcessor",
    "LavitImageProcessorPil",
    "LavitModel",
    "LavitPreTrainedModel",
    "LavitPreTrainingConfig",
    "LavitTokenDecoder",
    "LavitTokenDecoderConfig",
    "LavitTokenizer",
    "LavitVisualTokenizer",
    "LavitVisualTokenizerConfig",
    "LavitVisualTokenizerForPreTraining",
    "LavitVisualTokenizerOutput",
    "default_checkpoint",
]

if importlib.util.find_spec("diffusers") is not None:  # `from lavit_hf import *` works without it, too
    __all__ += _pipelines

register_auto_classes()


def default_checkpoint() -> str:
    """Where the checkpoint is that comes with the package: a small LaVIT that sees and draws scenes of emoji.

    It was trained from nothing by `examples/lavit_emoji/small.yaml`, on pictures that artists drew
    (`lavit_hf.data.emoji`); its model card tells how well it does. What it knows nothing of, it describes as something
    that it knows.

    Returns:
        A directory for `from_pretrained`.

    Raises:
        FileNotFoundError: The package was installed without it.
    """
    folder = Path(__file__).resolve().parent / "checkpoints" / "lavit-emoji-small"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no checkpoint: this installation lacks the package's data. Install lavit-hf again from a "
            "wheel or from a checkout."
        )
    return str(folder)


def __getattr__(name: str) -> Any:
    # Pipelines need diffusers, which importing the package must not load.
    if name in _pipelines:
        return getattr(importlib.import_module(".pipelines", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
