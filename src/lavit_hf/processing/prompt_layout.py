"""Which image stands where in which prompt, and the token rows made of text segments and images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..modeling.generation_lavit import GENERATION_MODES
from .image_structure import flatten, is_nested

VISUAL_MODES = ("continuous", "discrete", "bare")


@dataclass
class TokenRow:
    """The tokens of one prompt.

    `offsets` are the characters a token stands for, in the prompt with every placeholder replaced by the names of its
    image's tokens (empty ranges for those themselves); `replacements` tell where that happened, as `ProcessorMixin`
    does.
    """

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    replacements: list[dict[str, Any]] = field(default_factory=list)
    _prompt_length: int = 0
    _expanded_length: int = 0

    def add_text(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        """Appends a text segment."""
        start = self._expanded_length
        self.ids.extend(ids)
        self.offsets.extend((start + first, start + last) for first, last in offsets)
        self._prompt_length += len(text)
        self._expanded_length += len(text)

    def add_image(self, ids: Sequence[int], placeholder: str, replacement: str) -> None:
        """Appends the tokens of an image, whose names are `replacement`."""
        start, new_start = self._prompt_length, self._expanded_length
        self.image_spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids.extend(ids)
        self.offsets.extend([(new_start, new_start)] * len(ids))
        self._prompt_length += len(placeholder)
        self._expanded_length += len(replacement)
        self.replacements.append(
            {
                "type": "image",
                "span": (start, self._prompt_length),
                "new_span": (new_start, self._expanded_length),
                "text": placeholder,
                "replacement": replacement,
            }
        )

    def add_start(self, index: int) -> None:
        """Appends the start of an image that is to be drawn; it stands for no characters."""
        self.ids.append(index)
        self.offsets.append((self._expanded_length, self._expanded_length))

    def truncate(self, max_length: int, side: str, prompt_index: int) -> None:
        """Cuts text off one side; refuses to cut images, whose features the model would look for in vain."""
        excess = len(self.ids) - max_length
        if excess <= 0:
            return
        first, last = (excess, len(self.ids)) if side == "left" else (0, max_length)
        if any(start < first or end > last for start, end in self.image_spans):
            raise ValueError(
                f"Truncating prompt {prompt_index} from {len(self.ids)} to `max_length={max_length}` tokens on the "
                f"{side} would cut an image. Raise `max_length`, or pass fewer images or shorter text."
            )
        self.ids, self.offsets = self.ids[first:last], self.offsets[first:last]
        self.image_spans = [(start - first, end - first) for start, end in self.image_spans]


def check_prompts(text: Any, allow_empty: bool = False) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`text` must be a string or a list of strings.")
    if not prompts:
        raise ValueError("`text` is an empty list; pass at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not prompt and not allow_empty:
            raise ValueError(f"Prompt {index} is empty: it holds neither text nor an image placeholder.")
    return list(prompts)


def assign_images(images: Any, counts: Sequence[int], image_token: str) -> list[Any]:
    """All images in order of appearance, after checking that every prompt has as many images as placeholders.

    Args:
        images: Opened images: one, a flat list, a list per prompt, or `None`.
        counts: Placeholders per prompt.
        image_token: The placeholder, for messages.
    """
    if images is None:
        groups: list[list[Any]] = [[]]
    elif is_nested(images):
        groups = [flatten(group) for group in images]
    else:
        groups = [flatten(images)]
    details = _find_mismatch(groups, counts, image_token, per_prompt=images is not None and is_nested(images))
    if details:
        raise ValueError(
            f"The number of {image_token} tokens in the prompts should be the same as the number of images passed: "
            f"{details}."
        )
    return flatten(groups)


def _find_mismatch(groups: list[list[Any]], counts: Sequence[int], image_token: str, per_prompt: bool) -> str:
    if per_prompt and len(groups) != len(counts):
        return f"got {len(groups)} lists of images for {len(counts)} prompts"
    if per_prompt:
        wrong = (i for i, (group, count) in enumerate(zip(groups, counts, strict=True)) if len(group) != count)
        if (index := next(wrong, None)) is not None:
            return f"prompt {index} has {counts[index]}, but got {len(groups[index])} image(s) for it"
        return ""
    num_images = sum(map(len, groups))
    if num_images == sum(counts):
        return ""
    where = ", ".join(f"{count} in prompt {index}" for index, count in enumerate(counts))
    return f"found {sum(counts)} ({where}), but got {num_images} image(s)"


def assign_modes(visual_mode: Any, num_images: int) -> list[str]:
    """The visual mode of every image, from one for all or (nested) lists of one per image."""
    if isinstance(visual_mode, str):
        modes = [visual_mode] * num_images
    else:
        modes = flatten(visual_mode)
        if len(modes) != num_images:
            raise ValueError(f"Got {len(modes)} visual modes for {num_images} image(s).")
    return [check_visual_mode(mode) for mode in modes]


def check_visual_mode(mode: Any) -> str:
    """Returns the mode of an image if it is one."""
    if mode not in VISUAL_MODES:
        raise ValueError(f"`visual_mode` must be 'continuous', 'discrete' or 'bare', got {mode!r}.")
    return mode


def check_generation_mode(mode: str | None) -> str:
    """Returns what is to be generated; text by default."""
    mode = "text" if mode is None else mode
    if mode not in GENERATION_MODES:
        raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved', got {mode!r}.")
    return mode
