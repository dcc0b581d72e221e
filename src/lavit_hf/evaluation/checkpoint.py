"""The checkpoint that is evaluated."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.fingerprints import module_fingerprint

if TYPE_CHECKING:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..pipelines.pipeline_lavit_text_to_image import LavitTextToImagePipeline
    from ..processing.processing_lavit import ImageTextProcessor


class EvaluatedCheckpoint:
    """A loaded checkpoint.

    Args:
        name: Where it was loaded from.
        model: The model, on its device and in evaluation mode.
        processor: Its processor.
        load_pipeline: Makes a pipeline of both and of the pixel decoder of a name (`None` is the checkpoint's first
            one); needed only to draw.
    """

    def __init__(
        self,
        name: str,
        model: LavitForConditionalGeneration,
        processor: ImageTextProcessor,
        load_pipeline: Callable[[str | None], LavitTextToImagePipeline] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self._load_pipeline = load_pipeline
        self._pipelines: dict[str | None, LavitTextToImagePipeline] = {}

    @property
    def codebook_size(self) -> int:
        return self.model.config.visual_tokenizer_config.codebook_size

    def pipeline(self, decoder: str | None) -> Any:
        """Loads the pipeline of the model and a pixel decoder, once.

        Raises:
            ValueError: The checkpoint cannot draw.
        """
        if self._load_pipeline is None:
            raise ValueError(f"{self.name} was loaded without a pixel decoder, so it cannot draw.")
        if decoder not in self._pipelines:
            self._pipelines[decoder] = self._load_pipeline(decoder)
        return self._pipelines[decoder]

    @functools.cached_property
    def _weights(self) -> str:
        return module_fingerprint(self.model)

    def settings(self) -> dict[str, Any]:
        """Returns what all predictions depend on."""
        return {
            "weights": self._weights,
            "text_tokenizer": hashlib.sha256(self.processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "image_processor": self.processor.image_processor.to_dict(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "config": _without_origin(self.model.config.to_dict()),
            "generation_config": _without_origin(self.model.generation_config.to_diff_dict()),
            "visual_mode": self.processor.visual_mode,
        }

    def pixel_decoder_settings(self, decoder: str | None) -> dict[str, Any]:
        """Returns what drawings depend on besides."""
        pipeline = self.pipeline(decoder)
        parts = {name: getattr(pipeline, name) for name in ("token_decoder", "unet", "vae")}
        return {
            "pixel_decoder_weights": module_fingerprint(*parts.values()),
            "pixel_decoder_configs": {
                name: _without_origin(part.config if isinstance(part.config, Mapping) else part.config.to_dict())
                for name, part in parts.items()
            },
            "has_safety_checker": pipeline.safety_checker is not None,
            "scheduler": {"class": type(pipeline.scheduler).__name__, **dict(pipeline.scheduler.config)},
        }


# How a configuration was made, and not what a model does.
_ORIGIN = ("architectures", "auto_map", "disable_compile", "dtype", "torch_dtype", "transformers_version")


def _without_origin(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_origin(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in _ORIGIN and not str(name).startswith("_")
    }


__all__ = ["EvaluatedCheckpoint"]
