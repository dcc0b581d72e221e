"""The language model of a pipeline that draws prompts, of which `model_index.json` names the pixel decoder alone.

diffusers looks for the parts of a pipeline in folders of their names, and runs one file of code for each. A LaVIT is
at the root of its directory instead, in several files. So the pipeline, which comes as one file with all that it
imports, loads it from beside the pixel decoder that diffusers hands over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from ..modeling.configuration_lavit import LavitConfig
from ..modeling.modeling_lavit import LavitForConditionalGeneration
from ..modeling.modeling_lavit_visual_tokenizer import same_codebooks
from ..modeling.remote_code_mixin import IS_PACKAGE
from ..processing.image_processing_lavit import LavitImageProcessor
from ..processing.image_processing_pil_lavit import LavitImageProcessorPil
from ..processing.processing_lavit import ImageTextProcessor
from ..processing.tokenization_lavit import LavitTokenizer
from .pixel_decoder_storage import PACKAGE, lavit_beside, module_here

TEXT_TO_IMAGE = ("pipeline_lavit_text_to_image", "LavitTextToImagePipeline")


def language_model_classes() -> tuple[Any, Any]:
    """The classes of a language model and its processor: of the package, or where that is missing, of this file."""
    if not IS_PACKAGE:
        if (package := module_here(PACKAGE)) is not None:
            return package.LavitForConditionalGeneration, package.ImageTextProcessor
        # A processor loads its parts with the Auto classes.
        AutoConfig.register(LavitConfig.model_type, LavitConfig, exist_ok=True)
        AutoTokenizer.register(LavitConfig, fast_tokenizer_class=LavitTokenizer, exist_ok=True)
        image_processors: dict[str, type] = {"pil": LavitImageProcessorPil, "torchvision": LavitImageProcessor}
        AutoImageProcessor.register(LavitConfig, image_processor_classes=image_processors, exist_ok=True)
    return LavitForConditionalGeneration, ImageTextProcessor


def load_beside(token_decoder: Any, unet: Any, model: Any = None, processor: Any = None) -> tuple[Any, Any]:
    """Loads the language model and the processor from the directory that a pixel decoder was loaded from.

    Args:
        token_decoder: Of the pixel decoder; it knows where it comes from.
        unet: Likewise. The language model gets its dtype and its device.
        model: One that is there already.
        processor: Likewise.

    Raises:
        ValueError: If no language model is there, or it writes other codes.
    """
    place = getattr(token_decoder, "name_or_path", "")
    folder = Path(place).parent
    if not place or not lavit_beside(folder):
        raise ValueError(
            f"There is no LaVIT beside the pixel decoder, in {folder if place else 'any directory'}: give `model` and "
            "`processor`, or load a checkpoint that has both halves (`lavit assemble` makes one)."
        )
    model_class, processor_class = language_model_classes()
    if model is None:
        model = model_class.from_pretrained(folder, dtype=unet.dtype).to(unet.device)
        check_codebooks(str(folder), model, token_decoder)
    return model, processor_class.from_pretrained(folder) if processor is None else processor


def check_codebooks(source: str, model: Any, token_decoder: Any) -> None:
    """Makes sure that a language model writes the codes that a pixel decoder draws.

    Raises:
        ValueError: If they are others.
    """
    own = model.visual_tokenizer.discrete.quantizer.codebook.weight
    theirs = token_decoder.codebook.weight
    if not (own.is_meta or theirs.is_meta or same_codebooks(own, theirs)):
        raise ValueError(
            f"{source} cannot draw: its pixel decoder was trained with the codes of another visual tokenizer than "
            "that of the language model. See lavit assemble --help."
        )
