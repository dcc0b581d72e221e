"""From a directory to where others find it: the Hugging Face Hub, and servers of language models."""

from .card import Origin
from .export_llama import export_llama
from .files import PublishError
from .publish import Publication, PublishReport, prepare, publish
from .space import SpaceReport, publish_space

__all__ = [
    "Origin",
    "Publication",
    "PublishError",
    "PublishReport",
    "SpaceReport",
    "export_llama",
    "prepare",
    "publish",
    "publish_space",
]
