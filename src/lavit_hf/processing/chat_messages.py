"""The messages of a chat: their form, and what keeps text typed in one from becoming an image placeholder.

`chat_template.jinja` renders an image and "what is it?" as the original's VQA prompt, "<image>Question: what is it?
Answer:"; an image alone is its caption prompt. Only the answer to a text question starts with " Answer:": that of an
image alone is a caption. With `generation_mode="image"` a user's text describes what to draw and stays as it is.
"""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

# Set while a chat is tokenized: the character that stands for a "<" typed in it. transformers renders the chat and
# calls the processor in one go; an argument to hand the character on by would be one that all callers see.
hidden_bracket: ContextVar[str | None] = ContextVar("hidden_bracket", default=None)
_MEDIA_KEYS = ("image", "url", "path", "base64", "image_url")
_MEDIA_TYPES = ("image", "image_url")
_PRIVATE_USE = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def check_chat(conversation: Any) -> None:
    """Checks the form of a chat, or of a batch of them; what a template makes of its roles is for that to say.

    Raises:
        ValueError: It is something else, or empty.
    """
    if isinstance(conversation, str) or not isinstance(conversation, (list, tuple)):
        raise ValueError(f"A chat is a list of messages, got {conversation!r:.80}.")
    if not conversation:
        raise ValueError("The chat is empty: it holds no message.")
    if isinstance(conversation[0], (list, tuple)):
        for chat in conversation:
            check_chat(chat)
        return
    for index, message in enumerate(conversation):
        _check_message(f"Message {index} of the chat", message)


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{name} must have a role and a content, got {message!r:.80}.")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{name}: the content must be a text or a list of parts, got {content!r:.80}.")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f"{name}: every part must have a type, such as 'text' or 'image'; got {part!r:.80}.")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{name}: a part of type 'text' must have a text, got {part!r:.80}.")


def hide_brackets(*values: Any, beside: Any = ()) -> tuple[str, list[Any]]:
    """Replaces "<" by another character in all text of a chat, so that no text in it can spell `<image>`.

    After rendering, every "<image>" left is the template's own, however the template joined the pieces. The other
    character is one that does not occur in the chat, so `show_brackets` restores the text exactly; that it is one
    character for one keeps character offsets valid.

    Args:
        values: Conversations, tools, ... Paths and URLs of parts that are images are left as they are.
        beside: What else may come into the rendered chat: the template, its variables.

    Returns:
        The character used for "<", and the values with it.

    Raises:
        ValueError: If the chat leaves no character to use.
    """
    used = set().union(*_texts([*values, beside]))
    hidden = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
    if hidden is None:
        raise ValueError("The chat holds every private-use character of Unicode; leave one out.")
    return hidden, [_replace(value, hidden) for value in values]


def show_brackets(text: str, hidden: str | None) -> str:
    """Undoes `hide_brackets` in a part of the rendered chat."""
    return text if hidden is None else text.replace(hidden, "<")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _replace(value: Any, hidden: str) -> Any:
    if isinstance(value, str):
        return value.replace("<", hidden)
    if isinstance(value, Mapping):
        # Elsewhere, as in arguments of tools, such a key is a name like any other.
        kept = _MEDIA_KEYS if value.get("type") in _MEDIA_TYPES else ()
        return {_replace(key, hidden): item if key in kept else _replace(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, hidden) for item in value]
    return value
