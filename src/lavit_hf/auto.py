"""Makes transformers' Auto classes know LaVIT."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
)

from .modeling.configuration_lavit import (
    LavitConfig,
    LavitPreTrainingConfig,
    LavitTokenDecoderConfig,
    LavitVisualTokenizerConfig,
)
from .modeling.modeling_lavit import LavitForConditionalGeneration, LavitModel
from .modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from .modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .processing.image_processing_lavit import LavitImageProcessor
from .processing.image_processing_pil_lavit import LavitImageProcessorPil
from .processing.processing_lavit import ImageTextProcessor
from .processing.tokenization_lavit import LavitTokenizer


def register_auto_classes() -> None:
    """Registers every class of the package; harmless if called again."""
    for config_class in (LavitConfig, LavitVisualTokenizerConfig, LavitTokenDecoderConfig, LavitPreTrainingConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(LavitConfig, LavitModel, exist_ok=True)
    AutoModel.register(LavitVisualTokenizerConfig, LavitVisualTokenizer, exist_ok=True)
    AutoModel.register(LavitTokenDecoderConfig, LavitTokenDecoder, exist_ok=True)
    AutoModelForPreTraining.register(LavitPreTrainingConfig, LavitVisualTokenizerForPreTraining, exist_ok=True)
    AutoModelForImageTextToText.register(LavitConfig, LavitForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(LavitConfig, LavitForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        LavitConfig,
        image_processor_classes={"pil": LavitImageProcessorPil, "torchvision": LavitImageProcessor},
        exist_ok=True,
    )
    AutoTokenizer.register(LavitConfig, fast_tokenizer_class=LavitTokenizer, exist_ok=True)
    AutoProcessor.register(LavitConfig, ImageTextProcessor, exist_ok=True)
