"""Samples of images and text to batches for the language model (stage 2; LaVIT paper, section 3.2).

In this order: a sample becomes a row of segments, each a text or an image, in the order in which the model meets them
(a chat by the processor's template); segments get ids with marks at what is learned; and rows become a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ...processing.processing_lavit import ImageTextProcessor
from ...utils.seeds import sample_seed, sample_uniform
from ..dataset import FollowsEpoch, ImageContent, complete_row, image_contents, place_images

IGNORED = -100  # what a loss of transformers skips


@dataclass
class Segment:
    """A stretch of text of a row, or one of its images. First it has content, then ids as well.

    Attributes:
        text: The text; that of a chat comes as ids.
        learned_from: Where in the text (a character) begins what is learned; before that it is a prompt.
        image: The image in RGB; `None` if its codes alone are known.
        codes: Its codes, if they are known already.
        use: What an image is there for; `None` of text. `"read"` is read, as features, or as codes where those are all
            there is, `"bare"` is read as codes alone, without start and end, as generation reads pictures in the
            prompt of a drawing; `"drawn"` is learned, as codes.
        ids: The ids.
        is_learned: A mark at every id that is learned.
        pixel_values: Of an image that is read as features, or has no codes yet, what is encoded, `[channels, height,
            width]`.
        num_tokens: How many tokens an image becomes; `None` leaves it to the visual tokenizer.
    """

    text: str = ""
    learned_from: int = 0
    image: Any = None
    codes: list[int] | None = None
    use: str | None = None
    ids: list[int] = field(default_factory=list)
    is_learned: list[bool] = field(default_factory=list)
    pixel_values: torch.Tensor | None = None
    num_tokens: int | None = None

    @classmethod
    def of_image(cls, content: ImageContent, use: str) -> Segment:
        """A segment of an image of a row."""
        return cls(image=content.image, codes=content.codes, use=use)

    @property
    def has_known_ids(self) -> bool:
        """Whether codes that are known already are what this image becomes."""
        return self.codes is not None and (self.image is None or self.use != "read")

    def set_ids(self, ids: Sequence[int]) -> None:
        """Gives an image its ids: all of them are learned, or none."""
        self.ids, self.is_learned = list(ids), [self.use == "drawn"] * len(ids)

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
    """The ids and labels of a sample, segment by segment.

    Attributes:
        sample_id: The sample.
        segments: Its text and images in order.
        epoch: When it has its turn.
    """

    sample_id: int
    segments: list[Segment] = field(default_factory=list)
    epoch: int = 0

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def ids(self) -> list[int]:
        """All ids, `[length]`."""
        return [index for segment in self.segments for index in segment.ids]

    @property
    def labels(self) -> list[int]:
        """What is to be predicted, `[length]`: nothing before the first id could predict that one."""
        labels = [
            index if is_learned else IGNORED
            for segment in self.segments
            for index, is_learned in zip(segment.ids, segment.is_learned, strict=True)
        ]
        return [IGNORED, *labels[1:]]

    @property
    def pixel_values(self) -> list[torch.Tensor]:
        """Its continuous images in order, `[channels, height, width]` each."""
        return [segment.pixel_values for segment in self.segments if segment.pixel_values is not None]

    def end(self, eos_token_id: int) -> None:
        """Appends the end of text if what comes before is learned, so that the model learns to stop there.

        A chat template may have written the end already.
        """
        last = next((segment for segment in reversed(self.segments) if segment.ids), None)
        if last is None:
            return
        if last.ids[-1] == eos_token_id:
            last.is_learned[-1] = True
        elif last.is_learned[-1]:
            self.segments.append(Segment(ids=[eos_token_id], is_learned=[True]))

    def truncate(self, max_length: int) -> None:
        """Cuts text until the row is short enough: first that of prompts, from its start; then the end of the rest.

        Raises:
            ValueError: If images leave no room for anything to learn.
        """
        excess = len(self) - max_length
        texts = [segment for segment in self.segments if segment.use is None]
        for segment in texts:
            excess -= segment.drop_unlearned(excess)
        for segment in reversed(texts):
            excess -= segment.drop_last(excess)
        if excess > 0 or not any(any(segment.is_learned) for segment in self.segments):
            length = sum(len(segment.ids) for segment in self.segments if segment.use is not None)
            raise ValueError(
                f"The images of sample {self.sample_id} take {length} tokens and cannot be cut, which leaves nothing "
                f"to learn within `max_length={max_length}`. Raise it, or leave the sample out."
            )


def arrange_sample(
    sample: Mapping[str, Any], image_token: str, is_image_first: bool, is_dropped: bool
) -> list[Segment]:
    """Puts images and text in order.

    A sample with a prompt is taken as it is: the prompt's images are read (bare if the answer has images, as in
    generation), those of the answer drawn. Without one, images come before the text and are read, or they come after
    it and are drawn; where the text has placeholders, they stay there.

    Args:
        sample: A sample of `TrainingDataset`, with text.
        image_token: The placeholder of an image.
        is_image_first: Whether images are read; otherwise they are drawn.
        is_dropped: Whether to leave out the text before images that are drawn, so that the model learns to draw
            without one.
    """
    prompt, text = sample.get("prompt") or "", sample["text"]
    has_prompt = sample.get("prompt") is not None
    contents = image_contents(sample)
    if image_token not in prompt + text and contents:
        if has_prompt or is_image_first:
            prompt = image_token * len(contents) + prompt
        else:
            text = ("" if is_dropped else text) + image_token * len(contents)
    reads_all = not has_prompt and is_image_first
    draws_from_prompt = has_prompt and image_token in text
    images = iter(contents)
    segments: list[Segment] = []
    start, learned_from = 0, len(prompt)
    for position, piece in enumerate((prompt + _gap(prompt, text, image_token) + text).split(image_token)):
        if position > 0:
            is_drawn = not reads_all and start > learned_from
            use = "drawn" if is_drawn else "bare" if draws_from_prompt else "read"
            segments.append(Segment.of_image(next(images), use))
        if piece:
            segments.append(Segment(piece, learned_from=max(learned_from - start, 0)))
        start += len(piece) + len(image_token)
    return segments


def _gap(prompt: str, text: str, image_token: str) -> str:
    """The space between a prompt and its answer. It belongs to the answer: the model writes it with the first word."""
    is_open = bool(prompt) and not prompt.endswith(image_token) and not prompt[-1].isspace()
    return " " if is_open and text and not text[0].isspace() and not text.startswith(image_token) else ""


def arrange_chat(processor: ImageTextProcessor, sample: Mapping[str, Any]) -> list[Segment]:
    """Renders a chat with the processor's own template.

    Every answer before another turn ends with the end of text, learned as well: if only that of the last answer were
    learned, the model would go on after any other one. A template cannot say so, as text never becomes that token.

    Args:
        processor: Its template has to mark what the assistant says by `{% generation %}`.
        sample: A sample of `TrainingDataset`, with messages.
    """
    images: list[Segment] = []
    ends_turn: list[bool] = []
    messages = place_images(sample)
    for message in messages:
        if isinstance(message["content"], str):
            continue
        for position, part in enumerate(message["content"]):
            if part["type"] == "image":
                images.append(Segment.of_image(part["image"], "drawn" if message["role"] == "assistant" else "read"))
                ends_turn.append(message["role"] == "assistant" and position == len(message["content"]) - 1)
                # Only the place matters: images become ids later, all of a batch together.
                message["content"][position] = {**part, "image": Image.new("RGB", (1, 1))}
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"visual_mode": "continuous"},
    )
    ids, is_learned = _first(encoded["input_ids"]), [bool(mark) for mark in _first(encoded["assistant_masks"])]
    return _split_at_images(ids, is_learned, images, ends_turn, processor.tokenizer)


def _first(rows: Any) -> list[int]:
    return list(rows[0]) if isinstance(rows[0], (list, tuple)) else list(rows)


def _split_at_images(
    ids: list[int], is_learned: list[bool], images: list[Segment], ends_turn: list[bool], tokenizer: Any
) -> list[Segment]:
    """Cuts ids at the images in them, and ends the answers.

    Args:
        ids: Those of the chat.
        is_learned: Which of these.
        images: The images in it.
        ends_turn: Which of these are the last part of an answer.
        tokenizer: The tokenizer.
    """
    segments: list[Segment] = []
    start, is_open, end = 0, False, tokenizer.eos_token_id
    for image, is_end in zip(images, ends_turn, strict=True):
        first = ids.index(tokenizer.boi_token_id, start)
        if first > start or is_open:
            is_ended = image.use != "drawn"
            segments.append(_end_answers(ids[start:first], is_learned[start:first], end, is_open, is_ended))
        segments.append(image)
        start, is_open = ids.index(tokenizer.eoi_token_id, first) + 1, is_end
    if start < len(ids):
        # The end of the row is none of ours.
        segments.append(_end_answers(ids[start:], is_learned[start:], end, is_open, False))
    return segments


def _end_answers(
    ids: list[int], is_learned: list[bool], eos_token_id: int, is_open: bool, is_last_ended: bool
) -> Segment:
    """Puts the end of text after what is learned and followed by what is not, or by another's turn.

    Args:
        ids: What stands between two images.
        is_learned: Which of these.
        eos_token_id: The end of text.
        is_open: Whether an image before them was the last of an answer, whose end comes first.
        is_last_ended: Whether an image of another's turn follows.
    """
    segment = Segment(ids=[eos_token_id] if is_open else [], is_learned=[True] if is_open else [])
    followers = [*is_learned[1:], not is_last_ended][: len(ids)]
    for index, mark, next_mark in zip(ids, is_learned, followers, strict=True):
        segment.ids.append(index)
        segment.is_learned.append(mark)
        if mark and not next_mark and index != eos_token_id:
            segment.ids.append(eos_token_id)
            segment.is_learned.append(True)
    return segment


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
    - `codes` instead of images: as above, with codes in either order, and without any image processing;
    - `codes` beside images: images are read as features, and drawn from these codes.

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
        keep_rate_range: Every image that is read becomes another share of its patches as tokens, from this range, so
            that one model learns to read with all budgets. By default the visual tokenizer decides, as it always does
            of images that are drawn: a prompt does not tell the model how many tokens there are to be.
        max_length: Longer rows lose text: prompts first, from their start, then the end of the rest. Images are never
            cut.
        packing: Puts several rows into one sequence (of at most `max_length`) instead of padding. Images can enter as
            features with a `keep_rate_range` only, as else the model alone knows how many tokens they become: tokenize
            the dataset first, or set `image_first_probability=0`.
        pad_to_multiple_of: Rounds lengths up.
        blank_image: Adds a row with a blank image and without loss to batches that have no continuous image, so that
            every process runs the same layers. Needed where those have to agree: with FSDP, and under DDP without
            `ddp_find_unused_parameters`.
        encode_later: Leaves images without codes to [`~LavitDataCollator.finish`], so that worker processes open and
            preprocess them although the visual tokenizer is on a GPU. [`StreamTrainer`] finishes batches by itself.
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
        keep_rate_range: tuple[float, float] | None = None,
        encode_later: bool = False,
    ) -> None:
        for name, value in (
            ("image_first_probability", image_first_probability),
            ("condition_dropout", condition_dropout),
            ("text_noise", text_noise),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")
        if keep_rate_range is not None and not 0 < keep_rate_range[0] <= keep_rate_range[1] <= 1:
            raise ValueError(
                f"`keep_rate_range` must be two rates in order, above 0 and at most 1; got {keep_rate_range}."
            )
        if max_length is not None and max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {max_length}.")
        if packing and blank_image and keep_rate_range is None:
            raise ValueError(
                "`blank_image` is for batches with continuous images, which are packed with a `keep_rate_range` only."
            )
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
        self.keep_rate_range = keep_rate_range
        self.encode_later = encode_later

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates samples of a `TrainingDataset`, or rows of any dataset with the same columns.

        Returns:
            `input_ids` and `labels` `[rows, length]`; `attention_mask` `[rows, length]`, or with packing
            `position_ids`; and if images enter as features, `pixel_values` `[images, channels, height, width]`, with
            `keep_rate_range` also their `num_image_tokens`. What `encode_later` leaves has `sample_ids` `[rows]` and
            the `rows`.

        Raises:
            ValueError: If a row cannot be learned from, or its images cannot be packed or cut.
        """
        if not rows:
            raise ValueError("There are no rows to collate.")
        samples = [complete_row(row, self.epoch, needs_text=True) for row in rows]
        training_rows = [
            TrainingRow(sample["sample_id"], self._arrange(sample), sample["epoch"]) for sample in samples
        ]
        self._add_ids([segment for row in training_rows for segment in row.segments])
        if self.encode_later and _without_codes(training_rows):
            return {"sample_ids": torch.tensor([row.sample_id for row in training_rows]), "rows": training_rows}
        return self._complete(training_rows)

    def finish(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Encodes the images that `encode_later` has left, all of a batch together, where the visual tokenizer is.

        Args:
            batch: A batch of this collator. One that has all it needs is returned as it is.
        """
        return self._complete(batch["rows"]) if "rows" in batch else batch

    def _complete(self, training_rows: list[TrainingRow]) -> dict[str, Any]:
        self._encode(_without_codes(training_rows))
        for row in training_rows:
            row.end(self.processor.tokenizer.eos_token_id)
            if self.max_length is not None:
                row.truncate(self.max_length)
        if self.blank_image and not any(row.pixel_values for row in training_rows):
            training_rows.append(self._blank_row())
        if self.packing:
            if self.keep_rate_range is None:
                self._check_packable(training_rows)
            return join_rows(training_rows, self._pad_token_id, self.max_length, self.pad_to_multiple_of)
        batch = pad_rows(training_rows, self._pad_token_id, self.pad_to_multiple_of)
        if self.text_noise:
            batch["input_ids"] = self._add_noise(batch, training_rows)
        return batch

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _arrange(self, sample: Mapping[str, Any]) -> list[Segment]:
        key = (self.seed, sample["epoch"], sample["sample_id"])
        segments = self._order(sample, key)
        if self.keep_rate_range is not None:
            low, high = self.keep_rate_range
            images = [segment for segment in segments if segment.use in ("read", "bare") and not segment.has_known_ids]
            for index, segment in enumerate(images):
                rate = low + (high - low) * sample_uniform(*key, f"keep rate/{index}")
                segment.num_tokens = max(round(rate * self.processor.image_seq_length), 1)
        return segments

    def _order(self, sample: Mapping[str, Any], key: tuple[int, int, int]) -> list[Segment]:
        if "messages" in sample:
            return arrange_chat(self.processor, sample)
        return arrange_sample(
            sample,
            self.processor.image_token,
            is_image_first=sample_uniform(*key, "order") < self.image_first_probability,
            is_dropped=sample_uniform(*key, "condition") < self.condition_dropout,
        )

    def _add_ids(self, segments: list[Segment]) -> None:
        """Text to ids, codes that are known to ids, and images to pixels and, if read, placeholders; all together."""
        self._tokenize([segment for segment in segments if segment.use is None and not segment.ids])
        images = [segment for segment in segments if segment.use is not None]
        for segment in images:
            if segment.has_known_ids:
                ids = self.processor.tokenizer.convert_codes_to_ids(segment.codes)
                self._set_codes(segment, ids)
        self._preprocess([segment for segment in images if not segment.has_known_ids])

    def _tokenize(self, texts: list[Segment]) -> None:
        if not texts:
            return
        encoded = self.processor.tokenizer(
            [segment.text for segment in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for segment, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            segment.ids, segment.is_learned = ids, [end > segment.learned_from for _, end in offsets]

    def _preprocess(self, images: list[Segment]) -> None:
        """Images to pixels, and to placeholders if they are read."""
        if not images:
            return
        pixel_values = self.processor.image_processor([segment.image for segment in images], return_tensors="pt")
        for segment, pixels in zip(images, pixel_values["pixel_values"], strict=True):
            segment.image, segment.pixel_values = None, pixels
            if segment.use == "read":
                count = self.processor.image_seq_length if segment.num_tokens is None else segment.num_tokens
                placeholders = [self.processor.image_token_id] * count
                segment.set_ids(self.processor.tokenizer.add_image_start_and_end(placeholders))

    def _encode(self, images: list[Segment]) -> None:
        """Pixels to codes."""
        if not images:
            return
        visual_tokenizer = self.processor.get_visual_tokenizer()
        device = visual_tokenizer.device
        if device.type not in ("cpu", "meta") and get_worker_info() is not None:
            raise ValueError(
                f"A worker process cannot use a visual tokenizer on {device}. Leave images to the main process "
                "(`encode_later=True`, with StreamTrainer), set `dataloader_num_workers=0`, give the processor one "
                "that stays on the CPU, or tokenize the dataset first."
            )
        # The model's own one is in training mode, where encoders with dropout would give other codes every time.
        with _evaluation_mode(visual_tokenizer):
            for group in _by_budget(images):
                budgets = [segment.num_tokens for segment in group if segment.num_tokens is not None]
                pixels = [segment.pixel_values for segment in group if segment.pixel_values is not None]
                rows = self.processor.tokenize_pixels(torch.stack(pixels), num_tokens=budgets or None)
                for segment, ids in zip(group, rows, strict=True):
                    segment.pixel_values = None
                    self._set_codes(segment, ids)

    def _set_codes(self, segment: Segment, ids: list[int]) -> None:
        is_bare = segment.use == "bare"
        segment.set_ids(ids if is_bare else self.processor.tokenizer.add_image_start_and_end(ids))

    def _blank_row(self) -> TrainingRow:
        num_tokens = None if self.keep_rate_range is None else 1
        blank = Segment(image=Image.new("RGB", (1, 1)), use="read", num_tokens=num_tokens)
        self._add_ids([blank])
        return TrainingRow(-1, [blank])

    def _add_noise(self, batch: Mapping[str, torch.Tensor], rows: list[TrainingRow]) -> torch.Tensor:
        tokenizer, input_ids = self.processor.tokenizer, batch["input_ids"]
        first, codebook_size = tokenizer.visual_token_offset, tokenizer.codebook_size
        is_image = (input_ids >= first) & (input_ids < first + codebook_size) | (input_ids == tokenizer.image_token_id)
        seeds = [sample_seed(self.seed, row.epoch, row.sample_id, "noise") for row in rows]
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
                    "many tokens the image becomes is known only to the model. Use `packing=False`, give a "
                    "`keep_rate_range`, tokenize the dataset first, or set `image_first_probability=0` (samples with "
                    "a `prompt` always read images)."
                )


def _without_codes(rows: Iterable[TrainingRow]) -> list[Segment]:
    """Images that are to become codes, and have only pixels yet."""
    segments = [segment for row in rows for segment in row.segments]
    return [segment for segment in segments if segment.pixel_values is not None and segment.use != "read"]


def _by_budget(images: Sequence[Segment]) -> list[list[Segment]]:
    """Images with a budget, and those of which the visual tokenizer decides: it takes budgets for all or for none."""
    groups: list[list[Segment]] = [[], []]
    for segment in images:
        groups[segment.num_tokens is None].append(segment)
    return [group for group in groups if group]


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


def pad_rows(rows: Sequence[TrainingRow], pad_token_id: int, multiple: int | None = None) -> dict[str, torch.Tensor]:
    """One sequence per row, filled up to the longest, and the images that enter as features.

    Args:
        rows: The rows.
        pad_token_id: What to fill with, under a mask.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[rows, length]` each; and what [`stack_images`] gives.
    """
    width = _round_up(max(len(row) for row in rows), multiple)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return values + padding

    return {
        "input_ids": torch.tensor([pad(row.ids, pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, IGNORED) for row in rows]),
        **stack_images(rows),
    }


def stack_images(rows: Iterable[TrainingRow]) -> dict[str, torch.Tensor]:
    """The images of rows that enter as features, in order.

    Returns:
        `pixel_values` `[images, channels, height, width]` if there are any, and `num_image_tokens` `[images]` if they
        have budgets.
    """
    images = [
        (segment.pixel_values, segment.num_tokens)
        for row in rows
        for segment in row.segments
        if segment.pixel_values is not None
    ]
    if not images:
        return {}
    batch = {"pixel_values": torch.stack([pixels for pixels, _ in images])}
    counts = [count for _, count in images if count is not None]
    return {**batch, "num_image_tokens": torch.tensor(counts)} if counts else batch


def join_rows(
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
        `input_ids`, `position_ids` and `labels`, `[sequences, length]` each, `use_cache=False`, and what
        [`stack_images`] gives.

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
        **stack_images(row for sequence in sequences for row in sequence),
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


__all__ = [
    "IGNORED",
    "LavitDataCollator",
    "Segment",
    "TrainingRow",
    "add_text_noise",
    "arrange_chat",
    "arrange_sample",
    "join_rows",
    "pad_rows",
]
