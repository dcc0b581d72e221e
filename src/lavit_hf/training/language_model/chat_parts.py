"""A chat as parts: what the assistant says or draws is learned, the rest is read."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ...processing.processing_lavit import ImageTextProcessor
from ..sample_images import SOURCES, read_images
from .sample_parts import Part, Picture, Sample, Tokens


def chat_parts(processor: ImageTextProcessor, sample: Sample) -> list[Part]:
    """Renders a chat with the processor's own template.

    Every answer before another turn ends with the end of text, learned as well: if only that of the last answer were
    learned, the model would go on after any other one. A template cannot say so, as text never becomes that token.

    Args:
        processor: Its template has to mark what the assistant says by `{% generation %}`.
        sample: A sample with `messages`; parts of type `image` are taken from them, or from the sample's images in
            order of appearance.

    Raises:
        ValueError: If there are not as many images as parts of type `image`, or nothing to learn.
    """
    messages, pictures = resolve_messages(sample), []
    for message in messages:
        for part in _parts(message["content"]):
            if part["type"] == "image":
                pictures.append(Picture.of(part["image"], message["role"] == "assistant"))
                # Only the place matters: images become ids later, all of a batch together.
                part["image"] = Image.new("RGB", (1, 1))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"Sample {sample.sample_id} has nothing to learn: no message is the assistant's.")
    if not any(_says_something(answer) for answer in answers):
        # The loss of a batch of nothing else would be NaN.
        raise ValueError(f"Sample {sample.sample_id} has nothing to learn: the assistant's messages are empty.")
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"visual_mode": "continuous"},
    )
    ids, is_learned = _first(encoded["input_ids"]), [bool(mark) for mark in _first(encoded["assistant_masks"])]
    return _split(ids, is_learned, pictures, processor)


def resolve_messages(sample: Sample) -> list[dict[str, Any]]:
    """The messages of a chat, with every image at its place.

    Args:
        sample: A sample with `messages`.

    Returns:
        A copy without empty fields. Parts of type `image` have theirs under `image`, opened (or as a list of codes):
        their own, or the sample's images in order of appearance.

    Raises:
        ValueError: If there are not as many images as parts of type `image`.
    """
    assert sample.messages is not None
    given = iter(sample.pictures)
    messages = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{name: value for name, value in part.items() if value is not None} for part in content]
            content = [
                {"type": "image", "image": _content(part, given, sample)} if part["type"] == "image" else part
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    if next(given, None) is not None:
        raise ValueError(f"Sample {sample.sample_id} has more images than its messages have parts of type image.")
    return messages


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _says_something(content: str | list[dict[str, Any]]) -> bool:
    return any(part["type"] == "image" or part["text"].strip() for part in _parts(content))


def _content(part: dict[str, Any], given: Any, sample: Sample) -> Any:
    source = next((part[name] for name in SOURCES if name in part), None)
    if source is not None:
        return read_images(source)[0]
    content = next(given, None)
    if content is None:
        raise ValueError(f"Sample {sample.sample_id} has fewer images than its messages have parts of type image.")
    return content


def _split(
    ids: list[int], is_learned: list[bool], pictures: list[Picture], processor: ImageTextProcessor
) -> list[Part]:
    """Cuts ids at the images in them, and ends the answers."""
    tokenizer = processor.tokenizer
    parts: list[Part] = []
    start = 0
    for picture in pictures:
        first = ids.index(tokenizer.boi_token_id, start)
        if first > start:
            text = Tokens(ids[start:first], is_learned[start:first])
            parts.append(_end_answers(text, tokenizer.eos_token_id, is_last_complete=not picture.is_learned))
        parts.append(picture)
        start = ids.index(tokenizer.eoi_token_id, first) + 1
    if start < len(ids):
        # The end of the row is none of ours.
        parts.append(_end_answers(Tokens(ids[start:], is_learned[start:]), tokenizer.eos_token_id, False))
    return parts


def _end_answers(text: Tokens, eos_token_id: int, is_last_complete: bool) -> Tokens:
    """Puts the end of text after what is learned and followed by what is not, or by another's turn."""
    ids: list[int] = []
    is_learned: list[bool] = []
    followers = [*text.is_learned[1:], not is_last_complete]
    for index, mark, next_mark in zip(text.ids, text.is_learned, followers, strict=True):
        ids.append(index)
        is_learned.append(mark)
        if mark and not next_mark and index != eos_token_id:
            ids.append(eos_token_id)
            is_learned.append(True)
    return Tokens(ids, is_learned)


def _first(rows: Any) -> list[int]:
    return list(rows[0]) if isinstance(rows[0], (list, tuple)) else list(rows)


__all__ = ["chat_parts", "resolve_messages"]
