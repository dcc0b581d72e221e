"""What the page asks of a checkpoint: what becomes of a picture, text as it is written, drawings.

Nothing here remembers a visitor: every call has all that it needs, so that any number of them may share a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..modeling.checkpoint_files import find_file, load_complete
from ..modeling.modeling_lavit import LavitForConditionalGeneration
from ..modeling.modeling_lavit_visual_tokenizer import move_pixels
from ..pipelines.image_to_text import ANSWER, CAPTION, answer_of, first_sentence, merge_options, question_prompt
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX
from ..processing.processing_lavit import ImageTextProcessor
from ..utils.patch_pictures import fit_panel, grey_out_dropped, patch_grid

if TYPE_CHECKING:
    from ..pipelines.pipeline_lavit_text_to_image import LavitTextToImagePipeline

# Called while pixels are drawn, with how many steps are done and how many there are.
Progress = Callable[[int, int], object]

# Of one visitor, while others wait.
MAX_CHARACTERS = 2000
MAX_PICTURES = 8

_STOP = "."  # a caption is a sentence


@dataclass(frozen=True)
class Token:
    """A token of a picture.

    Attributes:
        index: Its id in the vocabulary.
        code: The row of the codebook.
        patch: Which patch it stands for, in raster order.
        keep_probability: How sure the selector is to keep this patch.
        known: Patches of known pictures that become the same code: number of the picture, and patch.
    """

    index: int
    code: int
    patch: int
    keep_probability: float
    known: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Look:
    """What becomes of a picture.

    Attributes:
        overlay: The picture with the patches in grey that no token was spent on when it is read.
        num_tokens: How many were.
        num_patches: How many patches it has.
        positions: Positions of the language model that it takes, and would take without a selector.
        cache_bytes: What a position takes in the cache.
        tokens: Its words in the visual vocabulary.
    """

    overlay: Image.Image
    num_tokens: int
    num_patches: int
    positions: tuple[int, int]
    cache_bytes: int
    tokens: list[Token]


@dataclass(frozen=True)
class Drawing:
    """A picture that was drawn, and from how many tokens."""

    image: Image.Image
    num_tokens: int


class Studio:
    """A checkpoint at work.

    Args:
        model: A [`LavitForConditionalGeneration`], on its device.
        processor: Its processor.
        pipeline: The same with a pixel decoder; `None` if it cannot draw.
        known_pictures: Pictures in which to look for codes.
    """

    def __init__(
        self,
        model: LavitForConditionalGeneration,
        processor: ImageTextProcessor,
        pipeline: LavitTextToImagePipeline | None = None,
        known_pictures: Sequence[Image.Image] = (),
    ):
        # Of outputs, what is optional is known to be there.
        self.model: Any = model
        self.processor = processor
        self.pipeline: Any = pipeline
        self.known_pictures = list(known_pictures)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        known_pictures: Sequence[Image.Image] = (),
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Studio:
        """Loads a whole checkpoint; of one without a pixel decoder, all but drawing works.

        Args:
            checkpoint: Directory, or name on the Hub.
            known_pictures: See the class.
            device: By default a CUDA device if there is one.
            dtype: By default float32 on a CPU, where half precision is slow, and as stored elsewhere.

        Raises:
            OSError: If the model or its processor is not there.
            ValueError: If they do not fit together, or tensors are missing.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else "auto")
        model = load_complete(LavitForConditionalGeneration, checkpoint, dtype=dtype).eval()
        model.to(torch.device(device))
        processor = ImageTextProcessor.from_pretrained(checkpoint, visual_tokenizer=model)
        pipeline = None
        if any(find_file(checkpoint, f"{folder}{MODEL_INDEX}", {}) for folder in DECODER_FOLDERS):
            from ..pipelines import LavitTextToImagePipeline

            pipeline = LavitTextToImagePipeline.from_pretrained(
                checkpoint, model=model, processor=processor, dtype=model.dtype
            ).to(device)
        return cls(model, processor, pipeline, known_pictures)

    @property
    def num_patches(self) -> int:
        """Patches of a picture, the most tokens that it can become."""
        return self.model.config.visual_tokenizer_config.num_patches

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.num_patches, self.model.config.visual_tokenizer_config.image_size)

    @torch.no_grad()
    def look(self, image: Image.Image, num_tokens: int | None = None) -> Look:
        """Says what becomes of a picture.

        Args:
            image: The picture.
            num_tokens: How many tokens it may become; by default the visual tokenizer decides.

        Raises:
            ValueError: If it cannot become so many.
        """
        pixel_values = self._pixel_values([image])
        read = self.model.visual_tokenizer.embed(pixel_values, num_tokens=num_tokens).keep_mask[0]
        text = self.model.config.text_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        cache = 2 * text.num_hidden_layers * num_heads * head_size * self.model.dtype.itemsize
        count = int(read.sum())
        return Look(
            overlay=grey_out_dropped(fit_panel(image), read, self.grid),
            num_tokens=count,
            num_patches=self.num_patches,
            positions=(count + 2, self.num_patches + 2),
            cache_bytes=cache,
            tokens=self._tokens(pixel_values, num_tokens),
        )

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        values = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return move_pixels(values, self.model.visual_tokenizer)

    def _tokens(self, pixel_values: torch.Tensor, num_tokens: int | None) -> list[Token]:
        output = self.model.visual_tokenizer.encode(pixel_values, num_tokens=num_tokens)
        probabilities = output.selector_log_probs[0, :, 0].exp().tolist()
        patches = output.keep_mask[0].nonzero()[:, 0].tolist()
        offset = self.model.config.visual_token_offset
        return [
            Token(offset + code, code, patch, probabilities[patch], self._known_codes.get(code, ()))
            for code, patch in zip(output.codes.tolist(), patches, strict=True)
        ]

    @cached_property
    def _known_codes(self) -> dict[int, list[tuple[int, int]]]:
        """Where in the known pictures each code occurs."""
        found: dict[int, list[tuple[int, int]]] = {}
        if self.known_pictures:
            output = self.model.visual_tokenizer.encode(self._pixel_values(self.known_pictures))
            for (number, patch), code in zip(output.keep_mask.nonzero().tolist(), output.codes.tolist(), strict=True):
                found.setdefault(code, []).append((number, patch))
        return found

    def caption(self, image: Image.Image, num_tokens: int | None = None) -> Iterator[str]:
        """Describes a picture; yields the text as far as it is written, at last all of it."""
        for text in self._write(image, "", CAPTION, num_tokens):
            yield first_sentence(text)
            if _STOP in text:
                return

    def answer(self, image: Image.Image, question: str, num_tokens: int | None = None) -> Iterator[str]:
        """Answers a question about a picture; yields the text as far as it is written.

        Raises:
            ValueError: If the question is empty, too long, or has the placeholder of an image in it.
        """
        if not question.strip():
            raise ValueError("The question is empty.")
        _check_length("question", question)
        if self.processor.image_token in question:
            raise ValueError(
                f"{self.processor.image_token} cannot be part of a question: the picture stands before it."
            )
        for text in self._write(image, question_prompt(question.strip()), ANSWER, num_tokens):
            yield answer_of(text)

    def _write(
        self, image: Image.Image, prompt: str, original: dict[str, Any], num_tokens: int | None
    ) -> Iterator[str]:
        """Yields what has been written so far. Greedily: of a search, nothing is certain before its end."""
        options = merge_options(self.model, original, {"num_beams": 1})
        del options["length_penalty"]  # of a search
        inputs = self.processor(
            images=[image],
            text=f"{self.processor.image_token}{prompt}",
            num_image_tokens=num_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        nobody_waits = threading.Event()
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                watch = StoppingCriteriaList([_StopWhen(nobody_waits)])
                self.model.generate(**inputs, **options, do_sample=False, streamer=streamer, stopping_criteria=watch)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield text
        finally:  # the visitor may have left, or read enough
            nobody_waits.set()
            thread.join()
        if failures:
            raise failures[0]

    def draw(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        progress: Progress | None = None,
    ) -> Drawing:
        """Draws a picture.

        Args:
            prompt: What to draw.
            images: Pictures before the text.
            seed: The same seed draws the same picture.
            guidance_scale: How much to stress the prompt; by default as the checkpoint says.
            num_inference_steps: Denoising steps.
            progress: Called after each of them.

        Raises:
            ValueError: If there is nothing to draw, too much to read before, or a value is out of range.
        """
        if not prompt.strip() and not images:
            raise ValueError("The prompt is empty: say what to draw.")
        _check_length("prompt", prompt)
        if len(images) > MAX_PICTURES:
            raise ValueError(f"There are {len(images)} pictures before the text; at most {MAX_PICTURES} are taken.")
        output = self.pipeline(
            [*images, prompt] if images else prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=_report(progress),
        )
        return Drawing(output.images[0], len(output.codes[0]))

    def redraw(
        self,
        image: Image.Image,
        num_tokens: int | None = None,
        seed: int = 0,
        num_inference_steps: int = 25,
        progress: Progress | None = None,
    ) -> Drawing:
        """Draws a picture from its own tokens; arguments as for `look` and `draw`."""
        output = self.pipeline.reconstruct(
            image,
            num_image_tokens=num_tokens,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=_report(progress),
        )
        return Drawing(output.images[0], len(output.codes[0]))


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken.")


class _StopWhen(StoppingCriteria):
    """Stops as soon as something has happened."""

    ignores_ids = True

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def _report(progress: Progress | None) -> Callable[..., dict] | None:
    if progress is None:
        return None

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict:
        progress(step + 1, pipeline.num_timesteps)
        return {}

    return after_step


__all__ = ["Drawing", "Look", "Studio", "Token"]
