"""What a request asks of the engine: a job is one row of a batch, and knows when it is over.

Jobs are made by the threads that talk to clients and worked on by those of the engine. Whoever works on one calls
`take` with every id that the model writes for it, which also says whether the row may stop: at its end, at its limit,
at a stop word, or because nobody waits for it any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

_UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class JobCancelled(Exception):
    """Nobody waits for the result any more."""


class JobTimeout(Exception):
    """The time of the request is over."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as a model reads it.

    Attributes:
        input_ids: `[length]`.
        pixel_values: Its continuous images, `[images, 3, height, width]`.
        num_image_tokens: Their budgets, `[images]`.
        negative_ids: What guidance leads away from when drawing, `[length]`.
        has_images: Whether there are images in it, of either kind.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    num_image_tokens: torch.Tensor | None = None
    negative_ids: torch.Tensor | None = None
    has_images: bool = False

    @property
    def length(self) -> int:
        """Most positions that it takes in the language model, or its negative prompt if that takes more.

        A picture without a budget counts with all of its patches here; how many of them are kept is known later.
        """
        return max(len(self.input_ids), 0 if self.negative_ids is None else len(self.negative_ids))

    @property
    def form(self) -> Hashable:
        """What prompts of one batch have in common."""
        return self.num_image_tokens is not None, self.negative_ids is not None


@dataclass(frozen=True)
class TextOptions:
    """How text is written; rows of a batch share them.

    Attributes:
        temperature: 0 is greedy.
        top_p: Sample from the likeliest tokens with this probability together.
        top_k: Sample from this many likeliest tokens; 0 for all.
        num_beams: Beams of a search instead.
        length_penalty: Of that search.
        min_new_tokens: Shortest text; by default what the checkpoint says.
        max_new_tokens: Longest text of a search with beams. Otherwise each row has a limit of its own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    length_penalty: float | None = None
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class CodeOptions:
    """How visual codes are written; see [`LavitTextToImagePipeline`]."""

    guidance_scale: float
    min_new_tokens: int
    max_new_tokens: int
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    image_end_bias: float | None = None


@dataclass(frozen=True)
class PixelOptions:
    """How pixels are drawn; see [`LavitPixelDecoderPipeline`]."""

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


@dataclass
class Usage:
    """Tokens of a job.

    Attributes:
        prompt_tokens: Those that the model read: of images only the patches that were kept.
        image_tokens: How many of these are of images.
        new_tokens: Those that it wrote.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    new_tokens: int = 0


class Job:
    """One row of a batch.

    Args:
        prompt: What the model reads.
        deadline: When it is too late, of `time.monotonic`.
        seed: Of this row's own randomness, so that a result does not depend on who shares the batch.
        report: Called with progress, in the engine's threads.
    """

    def __init__(self, prompt: Prompt, deadline: float, seed: int = 0, report: Callable[[Any], object] | None = None):
        self.prompt = prompt
        self.deadline = deadline
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.usage = Usage()
        self.future: Future = Future()
        self.future.set_running_or_notify_cancel()  # a future cannot be cancelled behind the back of a worker
        self.has_reported = False
        self._report = report
        self._is_cancelled = False

    @property
    def key(self) -> Hashable:
        """Jobs of equal keys share a batch."""
        raise NotImplementedError

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the rest of it."""
        return self.future.done() or self._is_cancelled or time.monotonic() > self.deadline

    def cancel(self) -> None:
        """Lets the job end at the next step."""
        self._is_cancelled = True

    def restart(self) -> None:
        """Makes it as it was before anyone worked on it."""
        self.generator.manual_seed(self.seed)
        self.usage = Usage()

    def report(self, progress: Any) -> None:
        """Tells who waits for it how far it is."""
        if self._report is not None and not self.is_over:
            self.has_reported = True
            self._report(progress)

    def finish(self, result: Any) -> None:
        """Ends it well, unless it is over already."""
        if self.is_over:
            self.give_up()
        else:
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Ends it badly, unless it is over already."""
        if not self.future.done():
            self.future.set_exception(error)

    def give_up(self) -> None:
        """Ends a job that is cancelled or late."""
        late = time.monotonic() > self.deadline and not self._is_cancelled
        self.fail(JobTimeout() if late else JobCancelled())

    def take(self, new_id: int) -> bool:
        """Takes the next id of the row, and says whether that was the last."""
        raise NotImplementedError


class TextStream:
    """Text that grows by one id at a time; what it has given out never changes.

    Args:
        decode: Ids to text.
        stop: Words that the text ends before.
        byte_ids: Ids of single bytes. What they spell is known only after the last of a row of them: one that makes
            no character takes the others with it.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), byte_ids: Collection[int] = frozenset()
    ):
        self.ids: list[int] = []
        self.is_stopped = False
        self._decode = decode
        self._byte_ids = byte_ids
        self._stop = tuple(stop)
        self._given = 0

    def text(self, is_end: bool = False) -> str:
        """The text so far, without white space around it; before its end without what may still change."""
        known = len(self.ids)
        while not is_end and known and self.ids[known - 1] in self._byte_ids:
            known -= 1
        text = self._decode(self.ids[:known]).lstrip()
        found = [index for word in self._stop if (index := text.find(word)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)].rstrip()
        if not is_end:
            text = text.rstrip(_UNFINISHED)
            longest = max(map(len, self._stop), default=1) - 1
            held = (size for size in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-size:]))
            text = text[: len(text) - next(held, 0)]
        return text.rstrip()

    def _may_begin(self, end: str) -> bool:
        return any(word.startswith(end) for word in self._stop)

    def new_text(self, is_end: bool = False) -> str:
        """What is new since the last call."""
        text = self.text(is_end)
        new, self._given = text[self._given :], max(self._given, len(text))
        return new


@dataclass
class TextResult:
    """Text as a whole.

    Attributes:
        text: All of it, without white space around it.
        rest: What has not been reported before.
        finish_reason: `"stop"` or `"length"`.
        usage: Tokens read and written.
    """

    text: str
    rest: str
    finish_reason: str
    usage: Usage


class TextJob(Job):
    """Text after a prompt.

    Args:
        prompt: See [`Job`].
        deadline: See [`Job`].
        options: Those that the batch shares.
        max_tokens: Most ids of this row.
        decode: Ids to text.
        end_ids: Ids that end a text.
        stop: Words that it ends before.
        byte_ids: See [`TextStream`].
        seed: See [`Job`].
        report: Called with each new piece of text.
    """

    def __init__(
        self,
        prompt: Prompt,
        deadline: float,
        options: TextOptions,
        max_tokens: int,
        decode: Callable[[list[int]], str],
        end_ids: Sequence[int],
        stop: Sequence[str] = (),
        byte_ids: Collection[int] = frozenset(),
        seed: int = 0,
        report: Callable[[Any], object] | None = None,
    ):
        super().__init__(prompt, deadline, seed, report)
        self.options = options
        self.max_tokens = max_tokens
        self.end_ids = frozenset(end_ids)
        self._form = (decode, tuple(stop), byte_ids)
        self._is_watched = report is not None or bool(stop)
        self._has_ended = False
        self.stream = TextStream(*self._form)

    @property
    def key(self) -> Hashable:
        return "text", self.options, self.prompt.form

    def restart(self) -> None:
        super().restart()
        self._has_ended = False
        self.stream = TextStream(*self._form)

    def take(self, new_id: int) -> bool:
        if self.is_over:
            return True
        self.usage.new_tokens += 1
        if new_id in self.end_ids:
            self._has_ended = True
            return True
        self.stream.ids.append(new_id)
        if self._is_watched and (new := self.stream.new_text()):
            self.report(new)
        return self.stream.is_stopped or self.usage.new_tokens >= self.max_tokens

    def complete(self) -> None:
        """Ends it with the ids that it has taken."""
        rest = self.stream.new_text(is_end=True)
        is_stopped = self._has_ended or self.stream.is_stopped
        result = TextResult(self.stream.text(is_end=True), rest, "stop" if is_stopped else "length", self.usage)
        self.finish(result)


@dataclass
class ImageResult:
    """A picture that was drawn.

    Attributes:
        image: The picture.
        codes: What it was drawn from.
        seed: What it is drawn from again.
        is_flagged: Whether a safety checker has blackened it.
        usage: Tokens read and written.
    """

    image: Image.Image
    codes: torch.Tensor
    seed: int
    is_flagged: bool
    usage: Usage


@dataclass
class PartialImage:
    """A picture in the middle of being drawn."""

    image: Image.Image
    index: int


class ImageJob(Job):
    """A picture after a prompt: visual codes first, then pixels, which are the work of two workers.

    Args:
        prompt: See [`Job`].
        deadline: See [`Job`].
        codes: How its codes are written.
        pixels: How they are drawn.
        end_id: The image end.
        num_partial: Pictures to report while pixels are drawn.
        seed: See [`Job`].
        report: Called with each [`PartialImage`].
    """

    def __init__(
        self,
        prompt: Prompt,
        deadline: float,
        codes: CodeOptions,
        pixels: PixelOptions,
        end_id: int,
        num_partial: int = 0,
        seed: int = 0,
        report: Callable[[Any], object] | None = None,
    ):
        super().__init__(prompt, deadline, seed, report)
        self.code_options = codes
        self.pixel_options = pixels
        self.num_partial = num_partial
        self.end_id = end_id
        self.new_ids: list[int] = []
        self.codes: torch.Tensor | None = None
        self._after_codes: torch.Tensor | None = None

    @property
    def key(self) -> Hashable:
        if self.codes is None:
            return "codes", self.code_options, self.prompt.form
        return "pixels", self.pixel_options

    def restart(self) -> None:
        if self.codes is None:
            super().restart()
            self.new_ids = []
        else:
            assert self._after_codes is not None
            self.generator.set_state(self._after_codes)

    def take(self, new_id: int) -> bool:
        if self.is_over:
            return True
        self.usage.new_tokens += 1
        self.new_ids.append(new_id)
        return new_id == self.end_id or len(self.new_ids) >= self.code_options.max_new_tokens

    def keep_codes(self, codes: torch.Tensor) -> None:
        """Ends the first half. Noise goes on where the random numbers of the codes have ended, as in the pipeline."""
        self.codes = codes
        self._after_codes = self.generator.get_state()


__all__ = [
    "CodeOptions",
    "ImageJob",
    "ImageResult",
    "Job",
    "JobCancelled",
    "JobTimeout",
    "PartialImage",
    "PixelOptions",
    "Prompt",
    "TextJob",
    "TextOptions",
    "TextResult",
    "TextStream",
    "Usage",
]
