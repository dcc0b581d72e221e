"""What makes a sample bad: found when it is read, so that it can be skipped, and not in the middle of a batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from ..processing.tokenization_lavit import IMAGE_TOKEN, check_text
from .sample_images import SOURCES


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
        check_learned_text(sample["text"])
        check_prompt(sample.get("prompt"))
        _check_placeholders((sample.get("prompt") or "") + sample["text"], len(pictures))
    elif not pictures:
        raise ValueError("the image is missing")


def check_learned_text(text: Any) -> None:
    """Makes sure that there is text.

    Raises:
        ValueError: If it is missing, blank, or no text.
    """
    if not isinstance(text, str):
        raise ValueError("the text is missing" if text is None else f"the text is of type {type(text).__name__}")
    if not text.strip():
        raise ValueError("the text is empty")
    check_text(text)


def check_prompt(prompt: Any) -> None:
    """Makes sure that a prompt is text, or not there.

    Raises:
        ValueError: If it is something else.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"the prompt is of type {type(prompt).__name__}")
    check_text(prompt)


def read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The chat of a row; `None` if there is none, or one without messages beside other rows with some.

    Raises:
        ValueError: If it is no chat.
    """
    messages = row.get("messages")
    if messages is None or (isinstance(messages, (list, tuple)) and not messages):
        return None
    if not isinstance(messages, (list, tuple)) or not all(map(_is_message, messages)):
        raise ValueError(
            "one of its messages lacks a role, or a content that is a text or a list of parts with a type"
        )
    check_text(messages)
    return list(messages)


def read_codes(value: Any) -> list[list[int]]:
    """The codes of every image of a row, `None` being no image.

    Raises:
        ValueError: If it is no list of lists of integers.
    """
    images = [] if value is None else value
    try:
        return [[operator.index(code) for code in codes] for codes in images]
    except TypeError as error:
        raise ValueError(f"its codes are no lists of integers, one per image: {value!r:.60}") from error


def read_sample_id(row: Mapping[str, Any], index: int) -> int:
    """The row's `sample_id`, by default its index.

    Raises:
        ValueError: If it is no integer.
    """
    value = row.get("sample_id")
    if value is None:
        return index
    try:
        is_written = isinstance(value, str) or (isinstance(value, float) and value.is_integer())
        return int(value) if is_written else operator.index(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the sample_id {value!r} is no integer: number the samples, or rename the column") from error


def _check_placeholders(text: str, num_images: int) -> None:
    count = text.count(IMAGE_TOKEN)
    if count not in (0, num_images):
        raise ValueError(f"it has {num_images} image(s), but its text has {count} {IMAGE_TOKEN} placeholder(s)")


def _check_messages(messages: list[dict[str, Any]], num_images: int) -> None:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("there is nothing to learn: no message is the assistant's")
    if not any(map(_says_something, answers)):
        raise ValueError("there is nothing to learn: all messages of the assistant are empty")
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = [part for part in parts if part["type"] == "image"]
    count = sum(all(part.get(name) is None for name in SOURCES) for part in images)
    if count != num_images:
        raise ValueError(f"it has {num_images} image(s), but its messages have {count} part(s) that want one")


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    content = message.get("content")
    has_parts = isinstance(content, (list, tuple)) and all(map(_is_part, content))
    return isinstance(message.get("role"), str) and (isinstance(content, str) or has_parts)


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "image" or (part.get("text") or "").strip() for part in content)


__all__ = ["check_learned_text", "check_prompt", "check_sample", "read_codes", "read_messages", "read_sample_id"]
