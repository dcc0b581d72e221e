"""Samples of images and text to batches for the language model (stage 2; LaVIT paper, section 3.2).

In this order: a row becomes text and images in order (a chat by the processor's template), these become ids with marks
at what is learned, and rows of ids become a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ...processing.processing_lavit import ImageTextProcessor
from ...utils.seeds import sample_seed, sample_uniform
from ..dataset import (
    SOURCES,
    FollowsEpoch,
    bad_sample,
    check_columns,
    check_learned_text,
    check_prompt,
    number_row,
    read_codes,
    read_images,
    read_messages,
    read_sample_id,
)


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


IGNORED = -100  # what a loss of transformers skips


@dataclass
class Run:
    """Consecutive ids of one text or one image.

    Attributes:
        ids: The ids.
        is_learned: A mark at every id that is learned.
        is_image: Whether it is an image, which is never cut.
    """

    ids: list[int]
    is_learned: list[bool]
    is_image: bool = False

    def drop_unlearned(self, count: int) -> int:
        """Removes the first ids that are not learned, at most `count`; returns how many."""
        dropped = [position for position, is_learned in enumerate(self.is_learned) if not is_learned][: max(count, 0)]
        for position in reversed(dropped):
            del self.ids[position], self.is_learned[position]
        return len(dropped)

    def drop_last(self, count: int) -> int:
        """Removes the last ids, at most `count`; returns how many."""
        dropped = min(max(count, 0), len(self.ids))
        kept = len(self.ids) - dropped
        del self.ids[kept:], self.is_learned[kept:]
        return dropped


@dataclass
class TrainingRow:
    """The ids of a sample.

    Attributes:
        sample_id: The sample, for messages.
        runs: Its text and images.
        pixel_values: Its continuous images in order, `[channels, height, width]` each.
    """

    sample_id: int
    runs: list[Run] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(run.ids) for run in self.runs)

    @property
    def ids(self) -> list[int]:
        """All ids, `[length]`."""
        return [index for run in self.runs for index in run.ids]

    @property
    def labels(self) -> list[int]:
        """What is to be predicted, `[length]`: nothing before the first id could predict that one."""
        labels = [
            index if is_learned else IGNORED
            for run in self.runs
            for index, is_learned in zip(run.ids, run.is_learned, strict=True)
        ]
        return [IGNORED, *labels[1:]]

    def add(self, ids: Sequence[int], is_learned: bool | Sequence[bool], is_image: bool = False) -> None:
        """Appends ids, with one mark for all of them or one each."""
        marks = [is_learned] * len(ids) if isinstance(is_learned, bool) else list(is_learned)
        self.runs.append(Run(list(ids), marks, is_image))

    def end(self, eos_token_id: int) -> None:
        """Appends the end of text if what comes before is learned, so that the model learns to stop there.

        A chat template may have written the end already.
        """
        last = next((run for run in reversed(self.runs) if run.ids), None)
        if last is None:
            return
        if last.ids[-1] == eos_token_id:
            last.is_learned[-1] = True
        elif last.is_learned[-1]:
            self.add([eos_token_id], True)

    def truncate(self, max_length: int) -> None:
        """Cuts text until the row is short enough: first that of prompts, from its start; then the end of the rest.

        Raises:
            ValueError: If images leave no room for anything to learn.
        """
        excess = len(self) - max_length
        texts = [run for run in self.runs if not run.is_image]
        for run in texts:
            excess -= run.drop_unlearned(excess)
        for run in reversed(texts):
            excess -= run.drop_last(excess)
        if excess > 0 or not any(any(run.is_learned) for run in self.runs):
            length = sum(len(run.ids) for run in self.runs if run.is_image)
            raise ValueError(
                f"The images of sample {self.sample_id} take {length} tokens and cannot be cut, which leaves nothing "
                f"to learn within `max_length={max_length}`. Raise it, or leave the sample out."
            )


def pad_rows(
    rows: Sequence[TrainingRow], pad_token_id: int, padding_side: str = "left", multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """One sequence per row, filled up to the longest.

    Args:
        rows: The rows.
        pad_token_id: What to fill with, under a mask.
        padding_side: `"left"` or `"right"`.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[rows, length]` each.
    """
    width = _round_up(max(len(row) for row in rows), multiple)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return padding + values if padding_side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(row.ids, pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, IGNORED) for row in rows]),
    }


def pack_rows(
    rows: Sequence[TrainingRow], pad_token_id: int, max_length: int | None = None, multiple: int | None = None
) -> dict[str, Any]:
    """Several rows per sequence, each with positions of its own.

    From positions that start again, transformers sees where a row begins: its attention masks (and the lengths for
    FlashAttention) keep rows apart. It looks for them only without attention mask and without cache.

    Args:
        rows: Rows, none longer than `max_length`.
        pad_token_id: What to fill sequences up with; the filling is one more row of its own.
        max_length: Length that no sequence exceeds; by default all rows become a single one.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `position_ids` and `labels`, `[sequences, length]` each, and `use_cache=False`.

    Raises:
        ValueError: If a row is longer than `max_length`.
    """
    sequences = _fill_sequences(rows, max_length)
    width = _round_up(max(sum(map(len, sequence)) for sequence in sequences), multiple)
    ids, positions, labels = [], [], []
    for sequence in sequences:
        padding = width - sum(map(len, sequence))
        ids.append([index for row in sequence for index in row.ids] + [pad_token_id] * padding)
        labels.append([label for row in sequence for label in row.labels] + [IGNORED] * padding)
        lengths = [*map(len, sequence), padding]
        positions.append([position for length in lengths for position in range(length)])
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "labels": torch.tensor(labels),
        "use_cache": False,
    }


def _fill_sequences(rows: Sequence[TrainingRow], max_length: int | None) -> list[list[TrainingRow]]:
    """Spreads rows over as few sequences as will do, about equally long ones, so that little is to be filled up."""
    total = sum(map(len, rows))
    limit = total if max_length is None else max_length
    ordered = sorted(rows, key=len, reverse=True)
    for count in range(-(-total // limit), len(rows) + 1):
        sequences: list[list[TrainingRow]] = [[] for _ in range(count)]
        lengths = [0] * count
        for row in ordered:
            shortest = lengths.index(min(lengths))
            sequences[shortest].append(row)
            lengths[shortest] += len(row)
        if max(lengths) <= limit:
            return sequences
    raise ValueError(f"A row of {len(ordered[0])} ids does not fit into sequences of {max_length}.")


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def add_text_noise(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    is_image: torch.Tensor,
    kept_ids: Sequence[int],
    probability: float,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Replaces words of learned text after an image by others of the batch; what is to be predicted stays.

    A model that writes "a pink ..." guesses the next word from this one, too, as far as training had words go
    together. If the word that it reads may be wrong, the image tells more. (Word dropout: Bowman et al. 2016,
    https://arxiv.org/abs/1511.06349; replaced words: SwitchOut, https://arxiv.org/abs/1808.07512.) Rows that draw are
    left alone: their text says what to draw.

    Args:
        input_ids: `[rows, length]`.
        labels: `[rows, length]`, `-100` where nothing is learned.
        is_image: Boolean `[rows, length]`, true at ids and placeholders of images.
        kept_ids: Ids that are neither replaced nor replacements, such as the end of text.
        probability: Share of words that are replaced.
        generators: One for each row. Which of its words are replaced depends on this alone, by what also on the batch.

    Returns:
        New input ids.
    """
    is_learned = labels != IGNORED
    draws = (is_learned & is_image).any(dim=-1, keepdim=True)
    is_word = is_learned & ~draws & (is_image.cumsum(dim=-1) > 0)
    is_word &= ~torch.isin(input_ids, torch.tensor(list(kept_ids), dtype=input_ids.dtype))
    words = input_ids[is_word]
    noisy = input_ids.clone()
    for row, generator in enumerate(generators):
        positions = is_word[row].nonzero().squeeze(-1)
        chosen = positions[torch.rand(len(positions), generator=generator) < probability]
        if len(chosen):
            noisy[row, chosen] = words[torch.randint(len(words), (len(chosen),), generator=generator)]
    return noisy


class LavitDataCollator(FollowsEpoch):
    """Turns rows of images and text into inputs and labels of `LavitForConditionalGeneration`.

    What becomes of a row:

    - image and text: with `image_first_probability` `[image, text]`, where the image enters as features (the model
      encodes it, and its merger learns) and the text is learned; otherwise `[text, image]`, where the image becomes
      codes, and both are learned. Of the latter, `condition_dropout` lose their text, so that guidance has
      something to guide away from. Where the text says `<image>`, images stay where it says so;
    - text alone: is learned;
    - a `prompt` beside the text: images go into the prompt (before it, if it does not say `<image>`), and the text is
      the answer, which alone is learned. `<image>` in an answer is an image to draw; the prompt's images then enter as
      bare codes, as they do when such a prompt is drawn;
    - `messages`: what the assistant says or draws is learned;
    - `codes` instead of images: as above, with codes in either order, and without any image processing.

    After what is learned comes the end of text, learned as well. Decisions depend on seed, epoch and `sample_id` (and
    the wrong words of `text_noise` on the rest of the batch).

    Rows of a plain dataset are numbered by their content, and get their epoch from [`EpochCallback`]: without it, an
    image that is drawn is drawn in every epoch, and never read. Wrap what is evaluated in a `TrainingDataset`, so that
    it stays the same in every epoch. `Trainer` hands on these columns with `remove_unused_columns=False` only.

    Args:
        processor: The model's processor. Its visual tokenizer gives the codes, without gradient; if it has none, that
            of its checkpoint is loaded. Give it the model's own (`processor.visual_tokenizer = model`) to save the
            memory, unless its weights are sharded.
        seed: Of all decisions.
        image_first_probability: How often the image comes first.
        condition_dropout: How often an image is drawn without text.
        text_noise: Share of the words of learned text after an image that the model reads wrong, so that it relies on
            the image more than on what it wrote. They are replaced by others of the batch; what is learned stays.
            `Trainer` evaluates with the same collator, so that its `eval_loss` is of text with noise, too.
        max_length: Longer rows lose text: prompts first, from their start, then the end of the rest. Images are never
            cut.
        packing: Puts several rows into one sequence (of at most `max_length`) instead of padding. Not for images that
            enter as features, whose number of tokens the model alone knows: tokenize the dataset first, or set
            `image_first_probability=0`.
        pad_to_multiple_of: Rounds lengths up.
        blank_image: Adds a row with a blank image and without loss to batches that have no continuous image, so that
            every process runs the same layers. Needed where those have to agree: with FSDP, and under DDP without
            `ddp_find_unused_parameters`.
    """

    def __init__(
        self,
        processor: ImageTextProcessor,
        seed: int = 0,
        image_first_probability: float = 0.5,
        condition_dropout: float = 0.1,
        max_length: int | None = None,
        packing: bool = False,
        pad_to_multiple_of: int | None = None,
        blank_image: bool = False,
        text_noise: float = 0.0,
    ) -> None:
        for name, value in (
            ("image_first_probability", image_first_probability),
            ("condition_dropout", condition_dropout),
            ("text_noise", text_noise),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")
        if max_length is not None and max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {max_length}.")
        if packing and blank_image:
            raise ValueError("`blank_image` is for batches with continuous images, which cannot be packed.")
        if packing and text_noise:
            raise ValueError("`text_noise` needs rows of their own: use it without packing.")
        if processor.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token, which the model needs to learn where to stop.")
        super().__init__()
        self.processor = processor
        self.seed = seed
        self.image_first_probability = image_first_probability
        self.condition_dropout = condition_dropout
        self.max_length = max_length
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.blank_image = blank_image
        self.text_noise = text_noise

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates samples of a `TrainingDataset`, or rows of any dataset with the same columns.

        Returns:
            `input_ids` and `labels` `[rows, length]`; `attention_mask` `[rows, length]`, or with packing
            `position_ids`; and `pixel_values` `[continuous images, channels, height, width]` if there are any.

        Raises:
            ValueError: If a row cannot be learned from, or its images cannot be packed or cut.
        """
        if not rows:
            raise ValueError("There are no rows to collate.")
        samples = [read_sample(row, self.epoch) for row in rows]
        parts = [self._arrange(sample) for sample in samples]
        training_rows = self._build_rows(samples, parts)
        for row in training_rows:
            row.end(self.processor.tokenizer.eos_token_id)
            if self.max_length is not None:
                row.truncate(self.max_length)
        if self.packing:
            self._check_packable(training_rows)
            return pack_rows(training_rows, self._pad_token_id, self.max_length, self.pad_to_multiple_of)
        if self.blank_image and not any(row.pixel_values for row in training_rows):
            training_rows.append(self._blank_row())
        side = self.processor.tokenizer.padding_side
        batch = pad_rows(training_rows, self._pad_token_id, side, self.pad_to_multiple_of)
        if self.text_noise:
            batch["input_ids"] = self._add_noise(batch, samples)
        pixel_values = [pixels for row in training_rows for pixels in row.pixel_values]
        if pixel_values:
            batch["pixel_values"] = torch.stack(pixel_values)
        return batch

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _arrange(self, sample: Sample) -> list[Part]:
        if sample.messages is not None:
            return chat_parts(self.processor, sample)
        key = (self.seed, sample.epoch, sample.sample_id)
        return arrange_parts(
            sample,
            self.processor.image_token,
            is_image_first=sample_uniform(*key, "order") < self.image_first_probability,
            is_dropped=sample_uniform(*key, "condition") < self.condition_dropout,
        )

    def _build_rows(self, samples: list[Sample], parts: list[list[Part]]) -> list[TrainingRow]:
        """Text to ids, and images to codes or placeholders; all of a batch together."""
        flat = [part for row_parts in parts for part in row_parts]
        texts = iter(self._tokenize([part for part in flat if isinstance(part, Text)]))
        pictures = [part for part in flat if isinstance(part, Picture) and part.codes is None]
        self._encode([part for part in pictures if part.is_learned or part.is_bare])
        pixel_values = iter(self._preprocess([part.image for part in pictures if part.codes is None]))
        rows = []
        for sample, row_parts in zip(samples, parts, strict=True):
            row = TrainingRow(sample.sample_id)
            for part in row_parts:
                if isinstance(part, Picture):
                    row.add(self._picture_ids(part), part.is_learned, is_image=True)
                    if part.codes is None:
                        row.pixel_values.append(next(pixel_values))
                elif isinstance(part, Tokens):
                    row.add(part.ids, part.is_learned)
                else:
                    row.add(*next(texts))
            rows.append(row)
        return rows

    def _tokenize(self, texts: list[Text]) -> list[tuple[list[int], list[bool]]]:
        """Ids of every text, and marks at those that are learned."""
        if not texts:
            return []
        encoded = self.processor.tokenizer(
            [part.text for part in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            (ids, [end > part.learned_from for _, end in offsets])
            for part, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _encode(self, pictures: list[Picture]) -> None:
        """Gives pictures their codes."""
        if not pictures:
            return
        visual_tokenizer = self.processor.get_visual_tokenizer()
        device = visual_tokenizer.device
        if device.type not in ("cpu", "meta") and get_worker_info() is not None:
            raise ValueError(
                f"A worker process cannot use a visual tokenizer on {device}. Set `dataloader_num_workers=0`, give "
                "the processor one that stays on the CPU, or tokenize the dataset first."
            )
        # The model's own one is in training mode, where encoders with dropout would give other codes every time.
        with _evaluation_mode(visual_tokenizer):
            rows = self.processor.tokenize_images([part.image for part in pictures])
        for part, ids in zip(pictures, rows, strict=True):
            part.codes = self.processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()

    def _picture_ids(self, part: Picture) -> list[int]:
        tokenizer = self.processor.tokenizer
        if part.codes is None:
            ids = [tokenizer.image_token_id] * self.processor.image_seq_length
        else:
            ids = tokenizer.convert_codes_to_ids(part.codes)
        if part.is_bare:
            return list(ids)
        return [tokenizer.boi_token_id, *ids, tokenizer.eoi_token_id]

    def _preprocess(self, images: list[Any]) -> torch.Tensor:
        if not images:
            return torch.empty(0)
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def _blank_row(self) -> TrainingRow:
        row = TrainingRow(-1)
        picture = Picture(Image.new("RGB", (1, 1)))
        row.add(self._picture_ids(picture), False, is_image=True)
        row.pixel_values.append(self._preprocess([picture.image])[0])
        return row

    def _add_noise(self, batch: Mapping[str, torch.Tensor], samples: list[Sample]) -> torch.Tensor:
        tokenizer, input_ids = self.processor.tokenizer, batch["input_ids"]
        first, codebook_size = tokenizer.visual_token_offset, tokenizer.codebook_size
        is_image = (input_ids >= first) & (input_ids < first + codebook_size) | (input_ids == tokenizer.image_token_id)
        seeds = [sample_seed(self.seed, sample.epoch, sample.sample_id, "noise") for sample in samples]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return add_text_noise(
            input_ids, batch["labels"], is_image, tokenizer.all_special_ids, self.text_noise, generators
        )

    @staticmethod
    def _check_packable(rows: list[TrainingRow]) -> None:
        for row in rows:
            if row.pixel_values:
                raise ValueError(
                    f"Sample {row.sample_id} has an image that enters as features. Such rows cannot be packed: how "
                    "many tokens the image becomes is known only to the model. Use `packing=False`, tokenize the "
                    "dataset first, or set `image_first_probability=0` (samples with a `prompt` always read images)."
                )


@contextmanager
def _evaluation_mode(module: Any) -> Iterator[None]:
    if not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()


__all__ = [
    "IGNORED",
    "LavitDataCollator",
    "Part",
    "Picture",
    "Run",
    "Sample",
    "Text",
    "Tokens",
    "TrainingRow",
    "add_text_noise",
    "arrange_parts",
    "chat_parts",
    "pack_rows",
    "pad_rows",
    "read_sample",
    "resolve_messages",
]
