"""What makes a sample bad: found when it is read, so that it can be skipped, and not in the middle of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..processing.text_vocabulary import IMAGE_TOKEN

_SOURCES = ("image", "path", "url", "base64")


def check_sample(sample: Mapping[str, Any], needs_text: bool) -> None:
    """Makes sure that there is something to learn, and that text and images fit together.

    Args:
        sample: A sample of `TrainingDataset`.
        needs_text: Whether images alone will not do.

    Raises:
        ValueError: If it is bad.
    """
    pictures = sample["codes"] if "codes" in sample else sample["images"]
    if sample.get("messages") is not None:
        _check_messages(sample["messages"], len(pictures))
    elif needs_text:
        _check_text(sample["text"])
        _check_placeholders((sample.get("prompt") or "") + sample["text"], len(pictures))
    elif not pictures:
        raise ValueError("the image is missing")


def _check_text(text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text is {'missing' if text is None else 'empty'}")


def _check_placeholders(text: str, num_images: int) -> None:
    count = text.count(IMAGE_TOKEN)
    if count not in (0, num_images):
        raise ValueError(f"it has {num_images} image(s), but its text has {count} {IMAGE_TOKEN} placeholder(s)")


def _check_messages(messages: Any, num_images: int) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is nothing to learn: no message is the assistant's")
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    images = [part for part in parts if part["type"] == "image"]
    count = sum(all(part.get(name) is None for name in _SOURCES) for part in images)
    if count != num_images:
        raise ValueError(f"it has {num_images} image(s), but its messages have {count} part(s) that want one")


__all__ = ["check_sample"]
