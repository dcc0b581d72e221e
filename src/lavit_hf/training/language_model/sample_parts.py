"""What a sample is made of, in order: text and images, and which of them the language model learns to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plain_rows import bad_sample, check_columns, number_row
from ..sample_checks import check_learned_text, check_prompt, read_codes, read_messages, read_sample_id
from ..sample_images import read_images


@dataclass
class Text:
    """A stretch of text between images.

    Attributes:
        text: The text.
        learned_from: Where in it (a character) begins what is learned; before that it is a prompt.
    """

    text: str
    learned_from: int = 0


@dataclass
class Tokens:
    """Text that is tokenized already, with a mark at every id that is learned."""

    ids: list[int]
    is_learned: list[bool]


@dataclass
class Picture:
    """An image of the sample.

    Attributes:
        image: The image in RGB; `None` if its codes are known instead.
        is_learned: Whether the model learns to write it, as codes. Otherwise it reads it, as features if it can.
        codes: Its codes, if they are known already or as soon as they are.
        is_bare: Whether it is read as codes alone, without start and end, as generation reads pictures in the prompt
            of a drawing.
    """

    image: Any
    is_learned: bool = False
    codes: list[int] | None = None
    is_bare: bool = False

    @classmethod
    def of(cls, content: Any, is_learned: bool) -> Picture:
        """A picture from an image or from a list of codes."""
        has_codes = isinstance(content, list)
        return cls(None if has_codes else content, is_learned, content if has_codes else None)


Part = Text | Tokens | Picture


@dataclass
class Sample:
    """A row of a dataset, read and checked.

    Attributes:
        pictures: RGB images, or lists of codes.
        text: What is learned, with placeholders of images or without.
        prompt: What comes before it and is not learned; `None` if there is no prompt.
        messages: A chat instead of both.
        sample_id: What decisions about this sample depend on ...
        epoch: ... together with this.
    """

    pictures: list[Any]
    text: str | None
    prompt: str | None
    messages: list[dict[str, Any]] | None
    sample_id: int
    epoch: int


def read_sample(row: Mapping[str, Any], epoch: int = 0) -> Sample:
    """Reads a row of a `TrainingDataset`, or one with the columns `image`, `images` or `codes`, and `text`.

    Args:
        row: The row. Without a `sample_id` it is numbered by its content.
        epoch: The epoch, if the row does not say.

    Raises:
        ValueError: If nothing is in it to learn.
    """
    check_columns(row)
    sample_id = number_row(row) if row.get("sample_id") is None else read_sample_id(row, 0)
    try:
        messages = read_messages(row)
        if messages is None and "text" not in row:
            raise ValueError(
                f"there is no column 'text' or 'messages'; it has {', '.join(sorted(row))}. Those of other names need "
                "`dataset.rename_column`, or a TrainingDataset that is told them"
            )
        if messages is None:
            check_learned_text(row.get("text"))
        check_prompt(row.get("prompt"))
        has_codes = row.get("codes") is not None
        pictures = read_codes(row["codes"]) if has_codes else read_images(row.get("images", row.get("image")))
    except ValueError as error:
        raise bad_sample(sample_id, error) from error
    return Sample(
        pictures=pictures,
        text=row.get("text"),
        prompt=row.get("prompt"),
        messages=messages,
        sample_id=sample_id,
        epoch=epoch if row.get("epoch") is None else int(row["epoch"]),
    )


def arrange_parts(sample: Sample, image_token: str, is_image_first: bool, is_dropped: bool) -> list[Part]:
    """Puts images and text in order.

    A sample with a prompt is taken as it is: the prompt's images are read (bare if the answer has images, as in
    generation), those of the answer written. Without one,
    images come before the text and are read, or they come after it and are written like the text; where the text has
    placeholders, they stay there.

    Args:
        sample: A sample with text.
        image_token: The placeholder of an image.
        is_image_first: Whether images are read; otherwise they are written.
        is_dropped: Whether to leave out the text before images that are written, so that the model learns to draw
            without one.

    Raises:
        ValueError: If there are not as many placeholders as images.
    """
    assert sample.text is not None
    prompt, text = sample.prompt or "", sample.text
    count = len(sample.pictures)
    has_placeholders = image_token in prompt + text
    reads_all = sample.prompt is None and is_image_first
    if not has_placeholders and (sample.prompt is not None or is_image_first):
        prompt = image_token * count + prompt
    elif not has_placeholders and count > 0:
        text = ("" if is_dropped else text) + image_token * count
    if (prompt + text).count(image_token) != count:
        raise ValueError(
            f"Sample {sample.sample_id} has {count} image(s), but its text has "
            f"{(prompt + text).count(image_token)} {image_token} placeholder(s)."
        )
    pictures = iter(sample.pictures)
    draws_from_prompt = sample.prompt is not None and image_token in text
    parts: list[Part] = []
    start, learned_from = 0, len(prompt)
    for position, segment in enumerate((prompt + _gap(prompt, text, image_token) + text).split(image_token)):
        if position > 0:
            is_learned = not reads_all and start > learned_from
            picture = Picture.of(next(pictures), is_learned)
            picture.is_bare = draws_from_prompt and not is_learned
            parts.append(picture)
        if segment:
            parts.append(Text(segment, min(max(learned_from - start, 0), len(segment))))
        start += len(segment) + len(image_token)
    return parts


def _gap(prompt: str, text: str, image_token: str) -> str:
    """The space between a prompt and its answer. It belongs to the answer: the model writes it with the first word."""
    is_open = bool(prompt) and not prompt.endswith(image_token) and not prompt[-1].isspace()
    return " " if is_open and text and not text[0].isspace() and not text.startswith(image_token) else ""


__all__ = ["Part", "Picture", "Sample", "Text", "Tokens", "arrange_parts", "read_sample"]
