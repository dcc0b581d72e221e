"""What the engine's batches are worked on with: `generate` and the pixel decoder, in this process.

Rows of a batch differ in what is theirs (prompt, seed, limit, stop words) and share all other options. Each draws from
its own generator, so that it becomes the same, but for rounding, in any company.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F
from transformers import StoppingCriteria, StoppingCriteriaList

from ..pipelines.pipeline_lavit_pixel_decoder import LavitPixelDecoderPipeline, codes_of_ids
from ..pipelines.pipeline_lavit_text_to_image import NOT_OF_DRAWING, LavitTextToImagePipeline
from ..processing.tokenization_lavit import BYTE_TOKEN
from .jobs import (
    CodeOptions,
    ImageJob,
    ImageResult,
    JobCancelled,
    PartialImage,
    PixelOptions,
    Prompt,
    TextJob,
)

if TYPE_CHECKING:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..processing.processing_lavit import ImageTextProcessor

_MAX_TEXT = 256  # ids, where neither the request nor the checkpoint says how many
_MANY_POSITIONS = 2**15  # of language models that do not say how many they have, such as Bloom


class RowWatch(StoppingCriteria):
    """Gives every new id to the job of its row, and stops rows that are over.

    Args:
        jobs: One per row.
        is_search: Rows are those of beams, whose last ids are not final: only all rows can be stopped, at once.
    """

    ignores_ids = True  # it looks at the last one only, so that `generate` may leave empty placeholders out

    def __init__(self, jobs: Sequence[TextJob] | Sequence[ImageJob], is_search: bool = False):
        self._jobs = jobs
        self._is_search = is_search
        self._is_over = [False] * len(jobs)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        if self._is_search:
            return torch.full((len(input_ids),), all(job.is_over for job in self._jobs), device=input_ids.device)
        for row, (job, new_id) in enumerate(zip(self._jobs, input_ids[:, -1].tolist(), strict=True)):
            if not self._is_over[row] and job.take(new_id):
                self._is_over[row] = True
                if isinstance(job, TextJob):
                    job.complete()  # now, and not when the longest of its batch is written
        return torch.tensor(self._is_over, device=input_ids.device)


class TransformersBackend:
    """Runs a LaVIT of transformers and a pixel decoder of diffusers.

    Args:
        model: On its device.
        processor: Its processor.
        pipeline: Model, processor and pixel decoder; `None` to write text only.
    """

    def __init__(
        self,
        model: LavitForConditionalGeneration,
        processor: ImageTextProcessor,
        pipeline: LavitTextToImagePipeline | None = None,
    ):
        self.model = model
        self.pipeline = pipeline
        self._processor = copy.copy(processor)  # the caller's stays as it is
        self._processor.visual_tokenizer = model
        self._is_processing = threading.Lock()  # tokenizers change their own padding while they work
        vocabulary = processor.tokenizer.get_vocab()
        self.byte_ids = frozenset(index for token, index in vocabulary.items() if BYTE_TOKEN.fullmatch(token))
        self._longest_token = max(map(len, vocabulary))
        self._pixel_decoder: LavitPixelDecoderPipeline | None = None
        if pipeline is not None:
            self._pixel_decoder = pipeline.pixel_decoder
            self._pixel_decoder.set_progress_bar_config(disable=True)

    # What requests ask before there are jobs, in threads of their own

    @property
    def max_length(self) -> int:
        """Positions of the language model, for prompt and answer."""
        return getattr(self.model.config.text_config, "max_position_embeddings", _MANY_POSITIONS)

    @property
    def max_characters(self) -> int:
        """Characters that would fill all positions, if they made the longest tokens there are."""
        return self.max_length * self._longest_token

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return list(ids) if isinstance(ids, (list, tuple)) else [ids]

    @property
    def end_of_image(self) -> int:
        """The id that ends an image."""
        return self.model.config.eoi_token_id

    @property
    def default_max_tokens(self) -> int:
        """Most ids of a text where the request does not say it."""
        return self.model.generation_config.max_new_tokens or _MAX_TEXT

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return self._processor.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def prepare(
        self,
        messages: list[dict[str, Any]],
        generation_mode: str = "text",
        negative_prompt: str | None = None,
        **options: Any,
    ) -> Prompt:
        """Turns a chat into a prompt.

        Args:
            messages: As for `apply_chat_template`; images are PIL images.
            generation_mode: `"text"` or `"image"`.
            negative_prompt: What guidance leads away from when drawing.
            **options: For the processor, such as `num_image_tokens` and `visual_mode`.

        Raises:
            ValueError: If the chat or an option is not what the processor takes.
        """
        arguments = {"return_tensors": "pt", **{name: value for name, value in options.items() if value is not None}}
        drawing = {"generation_mode": "image"} if generation_mode == "image" else {}
        negative = None
        with self._is_processing:
            inputs = self._processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                processor_kwargs=arguments,
                **drawing,
            )
            if negative_prompt is not None:
                negative = self._processor(text=negative_prompt, return_tensors="pt", **drawing)["input_ids"][0]
        ids = inputs["input_ids"][0]
        has_images = "pixel_values" in inputs or self._count_codes(ids) > 0
        return Prompt(ids, inputs.get("pixel_values"), inputs.get("num_image_tokens"), negative, has_images)

    def _count_codes(self, input_ids: torch.Tensor) -> int:
        """How many ids `[sequence]` are visual codes; tokens that users added come after these."""
        codes = input_ids - self.model.config.visual_token_offset
        return int(((codes >= 0) & (codes < self.model.config.visual_tokenizer_config.codebook_size)).sum())

    def complete_codes(self, prompt: Prompt, **given: Any) -> CodeOptions:
        """Options for writing codes: those given, and the pipeline's own defaults.

        Raises:
            ValueError: If one is out of range.
        """
        assert self.pipeline is not None
        values = {name: value for name, value in given.items() if value is not None}
        least, most = self.pipeline.default_lengths
        values.setdefault("guidance_scale", self.pipeline.default_guidance_scale(prompt.has_images))
        values.setdefault("max_new_tokens", most)
        values.setdefault("min_new_tokens", min(least, values["max_new_tokens"]))
        options = CodeOptions(**values)
        lengths = (options.min_new_tokens, options.max_new_tokens)
        self.pipeline.check_inputs(options.guidance_scale, *lengths, None)
        return options

    def check_pixels(self, options: PixelOptions) -> tuple[int, int]:
        """Checks how pixels are to be drawn.

        Returns:
            Height and width of the picture.

        Raises:
            ValueError: If something is out of range.
        """
        assert self._pixel_decoder is not None
        values = vars(options)
        self._pixel_decoder.check_call(1, **values)
        return self._pixel_decoder.resolve_size(options.height, options.width)

    # What the engine asks, in threads of its own

    @torch.no_grad()
    def write(self, jobs: Sequence[TextJob] | Sequence[ImageJob]) -> None:
        """See [`Backend`]."""
        if isinstance(jobs[0], TextJob):
            for part in self._parts_that_fit([job for job in jobs if isinstance(job, TextJob)]):
                self._write_text(part, self._inputs(part))
        else:
            self._write_codes([job for job in jobs if isinstance(job, ImageJob)], self._inputs(jobs))

    def _parts_that_fit(self, jobs: list[TextJob]) -> list[list[TextJob]]:
        """Splits a batch where its longest prompt and its longest text together need more positions than there are.

        A row that has ended goes on counting positions as long as one of its batch is written.
        """
        parts: list[list[TextJob]] = []
        for job in sorted(jobs, key=lambda job: job.prompt.length):
            wanted = [*(parts[-1] if parts else []), job]
            longest = max(one.prompt.length for one in wanted) + max(one.max_tokens for one in wanted)
            if parts and longest <= self.max_length:
                parts[-1].append(job)
            else:
                parts.append([job])
        return parts

    def _inputs(self, jobs: Sequence[TextJob] | Sequence[ImageJob]) -> dict[str, Any]:
        """What `generate` is given of prompts."""
        inputs = self._pad([job.prompt.input_ids for job in jobs])
        inputs |= self._encode_images(jobs)
        self._count(jobs)
        return inputs

    def draw(self, jobs: Sequence[ImageJob]) -> None:
        """See [`Backend`]."""
        assert self._pixel_decoder is not None
        codes = [cast(torch.Tensor, job.codes) for job in jobs]  # written by now
        generators = [job.generator for job in jobs]
        try:
            output: Any = self._pixel_decoder(
                codes,
                generator=generators,
                callback_on_step_end=_StepWatch(jobs),
                **vars(jobs[0].pixel_options),
            )
        except JobCancelled:
            return
        flagged = output.nsfw_content_detected or [False] * len(jobs)
        for job, image, is_flagged in zip(jobs, output.images, flagged, strict=True):
            assert job.codes is not None
            job.finish(ImageResult(image, job.codes, job.seed, is_flagged, job.usage))

    def _write_text(self, jobs: list[TextJob], inputs: dict[str, Any]) -> None:
        options = jobs[0].options
        is_search = options.num_beams > 1
        arguments: dict[str, Any] = {"num_beams": options.num_beams, "do_sample": False}
        if options.temperature > 0:
            arguments |= {"do_sample": True, "temperature": options.temperature}
            arguments |= {"top_k": options.top_k, "top_p": options.top_p}
            arguments["generator"] = [job.generator for job in jobs]
        for name in ("length_penalty", "min_new_tokens"):
            if (value := getattr(options, name)) is not None:
                arguments[name] = value
        most = max(job.max_tokens for job in jobs)
        watch = StoppingCriteriaList([RowWatch(jobs, is_search)])
        output = self.model.generate(**inputs, stopping_criteria=watch, max_new_tokens=most, **arguments)
        if is_search:
            for job, row in zip(jobs, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                for new_id in row:
                    if job.take(new_id):
                        break
        for job in jobs:
            job.complete()

    def _write_codes(self, jobs: list[ImageJob], inputs: dict[str, Any]) -> None:
        options: CodeOptions = jobs[0].code_options
        arguments = {name: value for name, value in vars(options).items() if value is not None}
        if options.do_sample:
            arguments["generator"] = [job.generator for job in jobs]
        else:
            arguments = {name: arguments[name] for name in arguments if name not in ("temperature", "top_k", "top_p")}
        negative = [job.prompt.negative_ids for job in jobs if job.prompt.negative_ids is not None]
        if negative and options.guidance_scale != 1:
            padded = self._pad(negative)
            arguments["negative_prompt_ids"] = padded["input_ids"]
            arguments["negative_prompt_attention_mask"] = padded["attention_mask"]
        watch = StoppingCriteriaList([RowWatch(jobs)])
        arguments |= NOT_OF_DRAWING
        self.model.generate(**inputs, generation_mode="image", stopping_criteria=watch, **arguments)
        config = self.model.config
        rows = [torch.tensor(job.new_ids, dtype=torch.long) for job in jobs]
        size = config.visual_tokenizer_config.codebook_size
        all_codes = codes_of_ids(rows, config.visual_token_offset, size, config.eoi_token_id)
        for job, codes in zip(jobs, all_codes, strict=True):
            job.keep_codes(codes)

    def _pad(self, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows of one width, with what pads them on the left under a mask."""
        width = max(map(len, rows))
        padding = self.model.config.boi_token_id  # any id would do, but the placeholder of an image
        ids = torch.stack([F.pad(row, (width - len(row), 0), value=padding) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _encode_images(self, jobs: Sequence[TextJob] | Sequence[ImageJob]) -> Mapping[str, Any]:
        """Encodes continuous images before `generate` would, to know how many tokens they become."""
        pixels = [job.prompt.pixel_values for job in jobs if job.prompt.pixel_values is not None]
        budgets = [job.prompt.num_image_tokens for job in jobs if job.prompt.num_image_tokens is not None]
        if not pixels:
            return {}
        encoded = self.model.get_image_features(
            pixel_values=torch.cat(pixels).to(self.model.device),
            num_image_tokens=torch.cat(budgets) if budgets else None,
            return_dict=True,
        )
        counts = [len(features) for features in encoded.pooler_output]
        for job in jobs:
            number = 0 if job.prompt.pixel_values is None else len(job.prompt.pixel_values)
            job.usage.image_tokens = sum(counts[:number])
            counts = counts[number:]
        return {"mm_encoder_outputs": {"image": encoded}}

    def _count(self, jobs: Sequence[TextJob] | Sequence[ImageJob]) -> None:
        placeholder = self.model.config.image_token_id
        for job in jobs:
            ids = job.prompt.input_ids
            placeholders = 0 if job.prompt.pixel_values is None else int((ids == placeholder).sum())
            job.usage.prompt_tokens = len(ids) - placeholders + job.usage.image_tokens
            job.usage.image_tokens += self._count_codes(ids)


class _StepWatch:
    """Looks after every denoising step whether anybody still waits, and shows who wants it how far it is."""

    def __init__(self, jobs: Sequence[ImageJob]):
        self._jobs = jobs

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if all(job.is_over for job in self._jobs):
            raise JobCancelled
        for row, job in enumerate(self._jobs):
            # Partial pictures at equal distances, the last before the end.
            due = [pipeline.num_timesteps * (index + 1) // (job.num_partial + 1) for index in range(job.num_partial)]
            if job.is_over or step + 1 not in due:
                continue
            pixels, flagged = pipeline.run_safety_checker(pipeline.decode_latents(tensors["latents"][row : row + 1]))
            if not flagged or not any(flagged):
                (image,) = pipeline.image_processor.postprocess(pixels, output_type="pil")
                job.report(PartialImage(image, due.index(step + 1)))
        return {}


__all__ = ["RowWatch", "TransformersBackend"]
