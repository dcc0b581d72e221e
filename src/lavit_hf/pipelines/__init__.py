"""Pipelines of diffusers: from visual codes, or from prompts, to pixels. They need `pip install lavit-hf[pixels]`.

Nothing here is imported before it is used, so that the rest of the package works without diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_MODULES = {
    "LavitPixelDecoderPipeline": "pipeline_lavit_pixel_decoder",
    "LavitPixelDecoderPipelineOutput": "pipeline_lavit_pixel_decoder",
    "LavitTextToImagePipeline": "pipeline_lavit_text_to_image",
    "LavitTextToImagePipelineOutput": "pipeline_lavit_text_to_image",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError(f"{name} needs diffusers: pip install 'lavit-hf[pixels]'")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
