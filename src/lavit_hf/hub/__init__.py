"""From a directory to where others find it: the Hugging Face Hub, and servers of language models."""

from .errors import PublishError
from .export_llama import export_llama
from .publish import PublishReport, publish

__all__ = ["PublishError", "PublishReport", "export_llama", "publish"]
