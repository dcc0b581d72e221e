"""Samples of images and text to batches for the language model (stage 2; LaVIT paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ...processing.processing_lavit import ImageTextProcessor
from ...utils.seeds import sample_seed, sample_uniform
from ..plain_rows import FollowsEpoch
from .batching import pack_rows, pad_rows
from .chat_parts import chat_parts
from .sample_parts import Part, Picture, Sample, Text, Tokens, arrange_parts, read_sample
from .text_noise import add_text_noise
from .token_rows import TrainingRow


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


__all__ = ["LavitDataCollator"]
