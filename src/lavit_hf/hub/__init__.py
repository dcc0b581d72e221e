"""From a directory to where others find it: the Hugging Face Hub, and servers of language models."""

from .export_llama import export_llama
from .files import PublishError
from .publish import PublishReport, publish

__all__ = ["PublishError", "PublishReport", "export_llama", "publish"]
