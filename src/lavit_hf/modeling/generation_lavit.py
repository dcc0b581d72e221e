"""Generation with images: encoded once before the decoding loop, and drawn by it.

transformers runs the loop, `GenerationMixin._sample`. A call of `generate` that draws adds processors of logits, which
[`LavitGenerationMixin._sample`] puts in order around those of transformers and of the caller:

1. [`Guidance`]: the model computes two rows per prompt, the prompt's own and an unconditional one;
   `prepare_inputs_for_generation` adds the latter, and the processor makes one row of scores out of both.
2. [`InterleavedGrammar`]: text may follow text, and codes may follow codes. [`ImageLength`]: how many.
   [`SuppressIds`]: what no image may hold, or end with.
3. [`GeneratorDraw`]: the caller's `generator` draws, and leaves nothing else to choose from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from .cache_lavit import CACHE_NAME, OUTPUTS, LavitDynamicCache, find_cache, remember_mask
from .compiled_steps import KeptCache, compiles_steps, keep_cache, take_cache
from .configuration_lavit import LavitConfig
from .image_placeholders import find_empty_placeholders, full_mask, pack_rows, placeholder_lengths, trim_rows

GENERATION_MODES = ("text", "image", "interleaved")
# Options that make a step generate several ids, or another loop take the steps.
_OTHER_LOOPS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "custom_generate")

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
PerPrompt: TypeAlias = float | Sequence[float] | torch.Tensor  # a number for all prompts of a call, or one for each


class _Options:
    """Generation options of a call, wherever they were given.

    Args:
        generation_config: That of the call; copied, because options are set in it if there is one. transformers does
            not like keyword arguments beside it.
        default: That of the model.
        kwargs: Keyword arguments of the call, which come first.
    """

    def __init__(self, generation_config: GenerationConfig | None, default: GenerationConfig, kwargs: dict[str, Any]):
        self.generation_config = copy.deepcopy(generation_config)
        self.kwargs = kwargs
        self._configs = [config for config in (self.generation_config, default) if config is not None]

    def get(self, name: str) -> Any:
        """The option's value, `None` if it is set nowhere."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        return next((value for config in self._configs if (value := getattr(config, name, None)) is not None), None)

    @property
    def num_rows(self) -> int:
        """Rows that transformers makes of each row of a prompt."""
        return int(max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1))

    def set(self, name: str, value: Any) -> None:
        """Sets an option where the call has its own."""
        if self.generation_config is None:
            self.kwargs[name] = value
        else:
            self.kwargs.pop(name, None)
            setattr(self.generation_config, name, value)


def open_image_starts(input_ids: torch.Tensor, config: LavitConfig) -> torch.Tensor:
    """Where the image starts that rows `[batch, sequence]` end in, `[batch]`; -1 if a row does not end in one."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = torch.where(torch.eq(input_ids, config.boi_token_id), positions, -1).amax(dim=-1)
    ends = torch.where(torch.eq(input_ids, config.eoi_token_id), positions, -1).amax(dim=-1)
    return torch.where(starts > ends, starts, -1)


class SuppressIds(LogitsProcessor):
    """Never generates the given ids; those beyond the vocabulary are ignored.

    transformers' own processor takes them from an option, which may be the user's.
    """

    def __init__(self, ids: list[int]):
        self.ids = ids
        self._suppressed: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._suppressed is None:  # once, as it waits for the device
            ids = [id for id in self.ids if id < scores.shape[-1]]
            self._suppressed = torch.tensor(ids, dtype=torch.long, device=scores.device)
        return scores.index_fill(-1, self._suppressed, -torch.inf)


def unconditional_rows(input_ids: torch.Tensor, config: LavitConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that see nothing but the image that the given ones `[batch, sequence]` end in.

    Returns:
        Ids and mask, `[batch, sequence]`. Where a row does not end in an image, its last id is seen alone, so that an
        image that starts later has no context but its start.
    """
    length = input_ids.shape[1]
    starts = open_image_starts(input_ids, config)
    first_seen = torch.where(starts < 0, length - 1, starts)
    mask = torch.arange(length, device=input_ids.device) >= first_seen[:, None]
    # Continuous images cannot be seen, so they need no features there; any other id stands in for them.
    return input_ids.masked_fill(torch.eq(input_ids, config.image_token_id), config.boi_token_id), mask.long()


class Guidance(LogitsProcessor):
    """Classifier-free guidance in one batch: `unconditional + scale * (conditional - unconditional)`.

    transformers runs guidance as a second forward pass per id. Here every prompt has two rows in one batch, its own
    and an unconditional one.

    Args:
        config: Its visual ids.
        scale: Weight of guidance on log-probabilities; with 1 there are no unconditional rows.
        vocab_slice: The model computes logits of ids `[first, last)` only; all others are never generated.
        negative_ids: What unconditional rows begin with instead of the prompts, `[batch, sequence]`, as wide as these.
            `None` for interleaved rows: guidance applies inside images only, and of what was before, unconditional
            rows see nothing. With either they see the image so far.
        negative_mask: Attention mask of `negative_ids`.

    Raises:
        ValueError: `scale` is not finite.
    """

    def __init__(
        self,
        config: LavitConfig,
        scale: float = 1.0,
        vocab_slice: tuple[int, int] | None = None,
        negative_ids: torch.Tensor | None = None,
        negative_mask: torch.Tensor | None = None,
    ):
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, got {scale}.")
        self.config = config
        self.scale = scale
        self.vocab_slice = vocab_slice
        self.negative_ids = negative_ids
        self.negative_mask = negative_mask

    @property
    def is_guided(self) -> bool:
        return self.scale != 1.0

    def add_unconditional_rows(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Doubles a batch, anew in every step: transformers keeps the rows of prompts only.

        Args:
            input_ids: Prompts and what is drawn so far, `[batch, sequence]`.
            attention_mask: `[batch, positions]`, all ones if `None`. There are more positions than ids if a process
                has finished and waits for others (`synced_gpus`).
            position_ids: `[batch, positions]`.

        Returns:
            Ids, mask and positions of `2 * batch` rows, unconditional ones last.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(position_ids)
        if self.negative_ids is None or self.negative_mask is None:
            ids, mask = unconditional_rows(input_ids, self.config)
        else:
            repeats = len(input_ids) // len(self.negative_ids)
            ids, mask = (rows.repeat_interleave(repeats, dim=0) for rows in (self.negative_ids, self.negative_mask))
            ids = torch.cat([ids, input_ids[:, ids.shape[1] :]], dim=-1)
        mask = torch.nn.functional.pad(mask, (0, position_ids.shape[1] - mask.shape[1]), value=1)
        positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
        return (
            torch.cat([input_ids, ids]),
            torch.cat([attention_mask, mask.to(attention_mask.dtype)]),
            torch.cat([position_ids, positions.to(position_ids.dtype)]),
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of prompts `[batch, vocabulary]` out of logits `[2 * batch, computed]`, or `[batch, computed]`."""
        if self.is_guided:
            conditional, unconditional = scores.log_softmax(dim=-1).chunk(2)
            scores = torch.lerp(unconditional, conditional, self.scale)
            if self.negative_ids is None:
                is_inside = open_image_starts(input_ids, self.config) >= 0
                scores = torch.where(is_inside[:, None], scores, conditional)
        return self.spread(scores)

    def spread(self, scores: torch.Tensor) -> torch.Tensor:
        """Puts what was computed at its place in the vocabulary: `[batch, computed]` -> `[batch, vocabulary]`."""
        if self.vocab_slice is None:
            return scores
        everything = scores.new_full((len(scores), self.config.text_config.vocab_size), -torch.inf)
        everything[:, slice(*self.vocab_slice)] = scores
        return everything

    def keep_prompts(self, output: Any, cache: Any, batch_size: int) -> None:
        """Takes unconditional rows out of what `generate` returns, in place."""
        if self.is_guided and cache is not None and not isinstance(cache, KeptCache):
            cache.reorder_cache(torch.arange(batch_size))  # `batch_select_indices` is for dynamic caches only
        if isinstance(output, torch.Tensor):
            return
        output.attentions = _first_rows(output.attentions, batch_size)
        output.hidden_states = _first_rows(output.hidden_states, batch_size)
        if output.logits is not None:
            output.logits = tuple(self.spread(logits[:batch_size]) for logits in output.logits)


def _first_rows(outputs: Any, batch_size: int) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_first_rows(part, batch_size) for part in outputs)
    return None if outputs is None else outputs[:batch_size]


class InterleavedGrammar(LogitsProcessor):
    """Which ids may follow: outside images text and the image start, inside codes and the image end."""

    def __init__(self, config: LavitConfig):
        self.config = config
        outside = torch.zeros(config.text_config.vocab_size, dtype=torch.bool)
        outside[config.visual_token_ids] = True
        inside, full = ~outside, torch.ones_like(outside)
        outside[config.boi_token_id], inside[config.boi_token_id] = False, True
        full[config.eoi_token_id] = False
        self.forbidden = torch.stack([outside, inside, full])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.forbidden = self.forbidden.to(scores.device)
        starts = open_image_starts(input_ids, self.config)
        num_codes = input_ids.shape[1] - starts - 1
        is_full = num_codes >= self.config.visual_tokenizer_config.num_patches
        state = torch.where(starts < 0, 0, 1 + is_full.long())
        return scores.masked_fill(self.forbidden[state], -torch.inf)


class ImageLength(LogitsProcessor):
    """How long an image that is drawn may be, and how much its end is favored.

    Args:
        config: Its visual ids.
        min_tokens: Fewest codes of an image, of all prompts or `[prompts]`.
        max_tokens: Most codes of an image.
        end_bias: Added to the score of the image end: above 0 images get shorter, below 0 longer.

    Raises:
        ValueError: If an image cannot have so many codes, or the numbers are in the wrong order.
    """

    def __init__(
        self,
        config: LavitConfig,
        min_tokens: PerPrompt | None = None,
        max_tokens: PerPrompt | None = None,
        end_bias: PerPrompt | None = None,
    ):
        num_patches = config.visual_tokenizer_config.num_patches
        self.config = config
        self.min_tokens = torch.as_tensor(0 if min_tokens is None else min_tokens)
        self.max_tokens = torch.as_tensor(num_patches if max_tokens is None else max_tokens)
        self.end_bias = torch.as_tensor(0.0 if end_bias is None else end_bias, dtype=torch.float32)
        limits = (self.min_tokens, self.max_tokens)
        if any(limit.is_floating_point() or limit.dtype == torch.bool or limit.ndim > 1 for limit in limits):
            raise ValueError("min_drawn_tokens and max_drawn_tokens must be integers, or one for each prompt.")
        if len({len(limit) for limit in limits if limit.ndim == 1} - {1}) > 1:
            raise ValueError(
                f"Got {len(self.min_tokens)} values of min_drawn_tokens, but {len(self.max_tokens)} of "
                "max_drawn_tokens; pass one, or one per prompt."
            )
        if (
            not ((self.min_tokens >= 0) & (self.min_tokens <= self.max_tokens) & (self.max_tokens >= 1)).all()
            or (self.max_tokens > num_patches).any()
        ):
            raise ValueError(
                f"min_drawn_tokens and max_drawn_tokens must be in order, and the latter from 1 to {num_patches}, the "
                f"patches of an image; got {min_tokens} and {max_tokens}."
            )
        if self.end_bias.ndim > 1 or not torch.isfinite(self.end_bias).all():
            raise ValueError(f"image_end_bias must be a finite number, or one for each prompt; got {end_bias}.")

    def check_number(self, num_prompts: int) -> None:
        """Raises a `ValueError` unless every limit is one for all prompts, or one for each."""
        for limit in (self.min_tokens, self.max_tokens, self.end_bias):
            if limit.ndim == 1 and len(limit) not in (1, num_prompts):
                raise ValueError(
                    f"Got {len(limit)} values of min_drawn_tokens, max_drawn_tokens or image_end_bias for "
                    f"{num_prompts} prompts; pass one, or one per prompt."
                )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        limits = (self.min_tokens, self.max_tokens, self.end_bias)
        self.min_tokens, self.max_tokens, self.end_bias = (limit.to(scores.device) for limit in limits)
        starts = open_image_starts(input_ids, self.config)
        num_codes, is_inside = input_ids.shape[1] - starts - 1, starts >= 0
        end = self.config.eoi_token_id
        of_end = scores[:, end] + torch.where(is_inside, self._of_rows(self.end_bias, scores), 0.0).to(scores.dtype)
        is_short = is_inside & (num_codes < self._of_rows(self.min_tokens, scores))
        is_full = is_inside & (num_codes >= self._of_rows(self.max_tokens, scores))
        scores = scores.masked_fill(is_full[:, None], -torch.inf)
        scores[:, end] = of_end.masked_fill(is_short, -torch.inf)
        return scores

    @staticmethod
    def _of_rows(limit: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return limit if limit.ndim == 0 else limit.repeat_interleave(len(scores) // len(limit))


class GeneratorDraw(LogitsProcessor):
    """Draws ids with the caller's generators; all other ids become impossible.

    Args:
        generator: One for the batch, or one per returned sequence.

    Raises:
        TypeError: A generator is something else.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator]):
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or a list of them, got {type(one).__name__}.")
        self.generator = generator
        self.criteria = StoppedRows()
        self.is_impossible: torch.Tensor | None = None  # whether there was nothing to draw from

    def check_number(self, batch_size: int) -> None:
        """Raises a `ValueError` unless there is one generator, or one for each of so many sequences."""
        if isinstance(self.generator, list) and len(self.generator) != batch_size:
            raise ValueError(
                f"Got {len(self.generator)} generators for {batch_size} sequences; pass one, or one per sequence."
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # `torch.multinomial` draws by the same numbers, but looks at the probabilities first, and so waits for them.
        probabilities = scores.softmax(dim=-1)
        is_impossible = probabilities.isnan().any()
        self.is_impossible = is_impossible if self.is_impossible is None else self.is_impossible | is_impossible
        drawn = (probabilities / self._noise(scores)).argmax(dim=-1, keepdim=True)
        is_drawn = torch.zeros_like(scores, dtype=torch.bool).scatter(1, drawn, True)
        return scores.masked_fill(~is_drawn, -torch.inf)

    def check_scores(self) -> None:
        """Raises a `ValueError` if a step had no number to draw by; looked at once, as that waits for the device."""
        if self.is_impossible is not None and self.is_impossible:
            raise ValueError(
                "There was nothing to draw from: the logits were no numbers (NaN), or options left no id to generate."
            )

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponentially distributed numbers, `[batch, vocabulary]`, from each row's generator or the only one."""
        if isinstance(self.generator, torch.Generator):
            return _exponential(scores, self.generator)
        noise = torch.ones_like(scores)
        for row, generator in enumerate(self.generator):
            # The generator of a stopped row stays where it is: what is drawn from it later must not depend on how
            # long the others are.
            if row not in self.criteria.stopped:
                noise[row] = _exponential(scores[row], generator)
        return noise


def _exponential(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.empty_like(like, device=generator.device).exponential_(generator=generator)
    if noise.device == like.device:
        return noise
    # From pinned memory the copy waits for nothing.
    return (noise.pin_memory() if like.device.type == "cuda" else noise).to(like.device, non_blocking=True)


class StoppedRows(StoppingCriteriaList):
    """Criteria that remember which rows they have stopped."""

    def __init__(self, criteria: Sequence[Any] = ()):
        super().__init__(criteria)
        self.stopped: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        # It waits for the device, but here transformers does the same right after it; in the next step, when the
        # model has been launched, it would wait for that.
        self.stopped.update(row for row, is_stopped in enumerate(stopped.tolist()) if is_stopped)
        return stopped


class PromptStreamer(BaseStreamer):
    """Streams the prompt as it was given, also where `generate` runs on a rewritten one, and then what comes.

    Args:
        streamer: The caller's.
        prompt: Ids of the prompt, `[batch, sequence]`.
    """

    def __init__(self, streamer: BaseStreamer, prompt: torch.Tensor):
        self.streamer = streamer
        self.prompt: torch.Tensor | None = prompt

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.repeat_interleave(len(value) // len(self.prompt), dim=0).to(value), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _pad_left(rows: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=value)


class ReadsImages(Protocol):
    """What `generate` asks of the model without its head, see [`LavitModel`]."""

    def encode_images(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        num_image_tokens: torch.Tensor | None = None,
        image_log_prior: torch.Tensor | None = None,
    ) -> Any: ...

    def check_ids(self, input_ids: torch.Tensor) -> None: ...

    def check_no_placeholders(self, is_placeholder: torch.Tensor) -> None: ...


if TYPE_CHECKING:

    class _Generative(PreTrainedModel, GenerationMixin):
        """What the mixin is mixed into."""

        config: LavitConfig
        model: ReadsImages

else:
    _Generative = GenerationMixin


class LavitGenerationMixin(_Generative):
    """`generate` for prompts with images, as placeholders or as codes, and for drawing."""

    @torch.no_grad()
    def generate(  # type: ignore[override]  # `args` and `kwargs` are those of the base class
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        generation_mode: str | None = None,
        generator: Generators = None,
        min_drawn_tokens: PerPrompt | None = None,
        max_drawn_tokens: PerPrompt | None = None,
        image_end_bias: PerPrompt | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | Any:
        """Generates text, visual tokens, or both, from text and images.

        Args:
            inputs: Prompt ids, `[batch, sequence]`; or pass `input_ids`.
            generation_config: See [`GenerationMixin.generate`].
            logits_processor: See [`GenerationMixin.generate`].
            args: See [`GenerationMixin.generate`].
            generation_mode: `"text"` (default) never generates visual ids. `"image"` draws one image after a prompt
                that ends with an image start (the processor's `generation_mode="image"`): only codes and the image end
                are generated (unless `suppress_tokens` says what is not), and each row stops at its end.
                `"interleaved"` goes on with text and images.
            generator: With `do_sample`: draws tokens from this generator, or from one per returned sequence, instead
                of the global random state; with one each, a sequence does not depend on the rest of the batch.
                Returned `scores` are -inf then, but at the id that was drawn.
            min_drawn_tokens: When drawing: fewest codes of an image, of all prompts or of each, `[prompts]`.
            max_drawn_tokens: When drawing: most codes of an image; its end follows. (`max_new_tokens` would stop
                without one.)
            image_end_bias: When drawing: added to the score of the image end. Above 0 images get shorter, below 0
                longer and more detailed.
            kwargs: Model inputs (what the processor returned) and generation options, see
                [`GenerationMixin.generate`]. When drawing, `guidance_scale` applies classifier-free guidance in one
                batch; the unconditional context is the image start alone, or `negative_prompt_ids`. On a GPU,
                transformers compiles the steps of calls with `max_new_tokens` and without beams, in a static cache
                that is kept for the next call, unless `cache_implementation`, a cache or `disable_compile` say
                otherwise.

        Returns:
            Prompt and new ids, `[batch * num_return_sequences, sequence + new]`, or a `ModelOutput` as in
            [`GenerationMixin.generate`], with an `attention_mask` to go on from the cache, see
            [`LavitGenerateDecoderOnlyOutput`]. The prompt comes back as it was given. With guidance, `logits`,
            `attentions`, `hidden_states` and the cache are those of the prompts' own rows; `scores` are the guided
            ones.

        Raises:
            ValueError: If the mode is unknown, prompts and images do not fit together, or options exclude each other.
        """
        mode = generation_mode or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {mode!r}.")
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("Pass the prompt either as inputs or as input_ids.")
            kwargs["input_ids"] = inputs
        cache = find_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        prompt = kwargs.get("input_ids")
        if prompt is not None and prompt.shape[-1] == 0:
            raise ValueError("The prompt is empty: input_ids hold no id. For a caption, put an image into it.")
        if kwargs.get("vocab_slice") is not None:
            raise ValueError("vocab_slice is for `forward`: what `generate` computes follows from generation_mode.")
        options = _Options(generation_config, self.generation_config, kwargs)
        self._apply_cached_mask(options)
        self._prepare_images(options, [*(logits_processor or []), *args])
        self._check_assistant(kwargs)
        if options.get("pad_token_id") == self.config.image_token_id:
            raise ValueError(
                f"pad_token_id={self.config.image_token_id} is the placeholder of continuous images: padding with it "
                "would read as an image. Leave it out, or pad with the end of text."
            )
        processors = LogitsProcessorList(logits_processor or [])
        limits = (min_drawn_tokens, max_drawn_tokens, image_end_bias)
        if mode != "text":
            self._check_one_by_one(options, f"generation_mode={mode!r}")
            processors += self._prepare_drawing(mode, options)
        is_limited = any(limit is not None for limit in limits)
        if is_limited and (mode == "text" or prompt is None):
            raise ValueError(
                "min_drawn_tokens, max_drawn_tokens and image_end_bias are for images that are drawn: pass "
                "generation_mode='image' or 'interleaved', and input_ids."
            )
        # No image has more codes than patches. `InterleavedGrammar` ends those of interleaved text by itself, and
        # callers who suppress the image end count for themselves.
        is_capped = mode == "image" and self.config.eoi_token_id not in (options.get("suppress_tokens") or ())
        if prompt is not None and (is_limited or is_capped):
            length = ImageLength(self.config, *limits)
            length.check_number(len(prompt))
            processors.append(length)
        if generator is not None:
            self._check_one_by_one(options, "generator")
            processors.append(GeneratorDraw(generator))
        processors.append(SuppressIds(self._forbidden_ids(mode, options)))
        if kwargs.get("streamer") is not None and prompt is not None and kwargs["input_ids"] is not prompt:
            kwargs["streamer"] = PromptStreamer(kwargs["streamer"], prompt)
        static_cache = self._take_static_cache(options, processors, args)
        if static_cache is not None:
            kwargs[CACHE_NAME] = static_cache
        output = super().generate(  # type: ignore[misc]  # transformers annotates `self` as a protocol that no model of its own fulfills
            None, options.generation_config, processors, *args, **kwargs
        )
        if static_cache is not None:
            keep_cache(self, static_cache)
        return output if prompt is None else self._complete(output, prompt, options)

    def _sample(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Runs [`GenerationMixin._sample`] with the processors of drawing in their places around those of others."""
        guidance = next((one for one in logits_processor if isinstance(one, Guidance)), None)
        draw = next((one for one in logits_processor if isinstance(one, GeneratorDraw)), None)
        grammar = [one for one in logits_processor if isinstance(one, (InterleavedGrammar, ImageLength))]
        processors = [one for one in logits_processor if one not in (guidance, draw, *grammar)]
        processors = [*([guidance] if guidance else []), *grammar, *processors]
        if draw is not None:
            draw.check_number(len(input_ids))
            if generation_config.do_sample:
                processors.append(draw)
                draw.criteria = stopping_criteria = StoppedRows(stopping_criteria)
                generation_config = copy.copy(generation_config)
                generation_config.do_sample = False  # One id is left, and the global random state is nobody's here.
        if guidance is not None and guidance.is_guided:
            kwargs["guidance"] = guidance
        output = super()._sample(  # type: ignore[misc]  # see `generate`
            input_ids, LogitsProcessorList(processors), stopping_criteria, generation_config, **kwargs
        )
        if draw is not None:
            draw.check_scores()
        if guidance is not None:
            guidance.keep_prompts(output, kwargs.get(CACHE_NAME), len(input_ids))
        return output

    def _take_static_cache(
        self, options: _Options, processors: list[LogitsProcessor], args: tuple[Any, ...]
    ) -> KeptCache | None:
        """A static cache for a call whose steps transformers can compile, unless the caller has said anything else.

        Who asks for outputs gets the cache, too, and may go on from it: a static one has no room for that.
        """
        length, input_ids = options.get("max_new_tokens"), options.kwargs.get("input_ids")
        said = ("cache_implementation", "disable_compile", "return_dict_in_generate", "prefill_chunk_size")
        others = any(options.get(name) for name in (*said, "synced_gpus", *_OTHER_LOOPS))
        if args or others or length is None or input_ids is None or options.kwargs.get(CACHE_NAME) is not None:
            return None
        if options.get("use_cache") is False or (options.get("num_beams") or 1) > 1 or not compiles_steps(self):
            return None
        is_guided = any(isinstance(one, Guidance) and one.is_guided for one in processors)
        rows = len(input_ids) * options.num_rows * (2 if is_guided else 1)
        return take_cache(self, rows, input_ids.shape[1] + length)

    def _forbidden_ids(self, mode: str, options: _Options) -> list[int]:
        """Ids that the mode never generates; the placeholder is one even after the embeddings have been resized."""
        forbidden = [self.config.image_token_id]
        if mode == "text":
            forbidden += self.config.visual_token_ids
        elif mode == "image" and options.get("suppress_tokens") is not None:
            # Tokens that a user added are no part of an image, whatever else may be drawn.
            forbidden += range(self._drawable_ids().stop, self.config.text_config.vocab_size)
        return forbidden

    def _drawable_ids(self) -> range:
        """Image end and codes."""
        end = self.config.visual_token_offset + self.config.visual_tokenizer_config.codebook_size
        return range(self.config.eoi_token_id, end)

    def _prepare_drawing(self, mode: str, options: _Options) -> list[LogitsProcessor]:
        """Sets options of a call that draws, and makes its processors of logits."""
        guidance_scale = options.get("guidance_scale")
        scale = 1.0 if guidance_scale is None else float(guidance_scale)
        options.set("guidance_scale", 1.0)  # Otherwise transformers would run its own guidance on top.
        if mode == "image":
            self._prepare_image(options)
        negative: dict[str, torch.Tensor] = {}
        if scale != 1.0:
            negative = self._prepare_unconditional_rows(mode, options)
        elif options.kwargs.pop("negative_prompt_ids", None) is not None:
            raise ValueError("negative_prompt_ids have no effect without guidance_scale.")
        guidance = Guidance(self.config, scale, options.kwargs.get("vocab_slice"), **negative)
        return [guidance, InterleavedGrammar(self.config)] if mode == "interleaved" else [guidance]

    def _prepare_image(self, options: _Options) -> None:
        input_ids = options.kwargs.get("input_ids")
        if input_ids is None or (open_image_starts(input_ids, self.config) < 0).any():
            raise ValueError(
                'To draw, prompts have to end with the image start. Use `processor(..., generation_mode="image")`; '
                'a pipeline of transformers needs `processor_kwargs={"generation_mode": "image"}` as well.'
            )
        if options.kwargs.get("eos_token_id") is None:
            options.set("eos_token_id", self.config.eoi_token_id)
        if options.get("max_new_tokens") is None and not options.get("max_length"):
            options.set("max_new_tokens", self.config.visual_tokenizer_config.num_patches + 1)
        if options.get("suppress_tokens") is None:
            drawable = self._drawable_ids()
            options.kwargs["vocab_slice"] = (drawable.start, drawable.stop)

    def _prepare_unconditional_rows(self, mode: str, options: _Options) -> dict[str, torch.Tensor]:
        """Checks that rows can be doubled.

        Returns:
            What they begin with, and its mask, unless that changes while rows are drawn. Prompts and negative prompts
            are padded to one width.
        """
        kwargs = options.kwargs
        input_ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE_NAME)
        is_filled = cache is not None and int(cache.get_seq_length()) > 0
        if input_ids is None or is_filled or kwargs.get("position_ids") is not None:
            raise ValueError(
                "Guidance needs input_ids, and can go on neither from a filled cache nor with given position_ids."
            )
        if options.get("prefill_chunk_size") is not None:
            raise ValueError(
                "prefill_chunk_size cannot be combined with guidance: what unconditional rows see follows from whole "
                "prompts. Leave it out."
            )
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        negative_ids = kwargs.pop("negative_prompt_ids", None)
        negative_mask = kwargs.pop("negative_prompt_attention_mask", None)
        if mode == "interleaved":
            if negative_ids is not None:
                raise ValueError(f"negative_prompt_ids are for generation_mode='image', not {mode!r}.")
            return {}
        if negative_ids is None:
            negative_ids, negative_mask = unconditional_rows(input_ids, self.config)
        if len(negative_ids) not in (1, len(input_ids)):
            raise ValueError(
                f"Got {len(negative_ids)} negative prompts for {len(input_ids)} prompts; pass one, or as many."
            )
        negative_ids = negative_ids.expand(len(input_ids), -1).to(input_ids.device)
        mask = torch.ones_like(negative_ids) if negative_mask is None else negative_mask.to(negative_ids)
        width, padding = max(input_ids.shape[1], negative_ids.shape[1]), self._padding_id()
        kwargs["input_ids"] = _pad_left(input_ids, width, padding)
        kwargs["attention_mask"] = _pad_left(kwargs["attention_mask"], width, 0)
        return {
            "negative_ids": _pad_left(negative_ids, width, padding),
            "negative_mask": _pad_left(mask.expand(len(input_ids), -1), width, 0),
        }

    @staticmethod
    def _check_assistant(kwargs: dict[str, Any]) -> None:
        assistant = kwargs.get("assistant_model")
        if assistant is None or kwargs.get("mm_encoder_outputs") is None:
            return
        if not isinstance(assistant, LavitGenerationMixin):
            raise ValueError(
                f"The assistant model is a {type(assistant).__name__}, which cannot take images as features. Use a "
                'LaVIT as the assistant, or images as codes (`processor(..., visual_mode="discrete")`).'
            )

    def _padding_id(self) -> int:
        """Some id to pad with under a mask, and not that of a placeholder."""
        pad_token_id = self.generation_config.pad_token_id
        is_usable = isinstance(pad_token_id, int) and pad_token_id != self.config.image_token_id
        return pad_token_id if is_usable else self.config.boi_token_id

    @staticmethod
    def _check_one_by_one(options: _Options, what: str) -> None:
        num_beams = options.get("num_beams") or 1
        if num_beams > 1:
            raise ValueError(f"{what} cannot be combined with num_beams={num_beams}; sample or decode greedily.")
        if name := next(filter(options.get, _OTHER_LOOPS), None):
            raise ValueError(f"{what} cannot be combined with {name}: ids are generated one by one.")

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        # Penalties that compare with the prompt look its ids up in the scores, which a placeholder without a row (see
        # `LavitConfig`) is beyond. The image start stands in for it, which is in the prompt anyway.
        if encoder_input_ids is not None and not encoder_input_ids.is_floating_point():  # else: embeddings
            is_placeholder = encoder_input_ids == self.config.image_token_id
            encoder_input_ids = encoder_input_ids.masked_fill(is_placeholder, self.config.boi_token_id)
        kwargs["encoder_input_ids"] = encoder_input_ids
        return super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]  # see `generate`

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        guidance: Guidance | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See [`GenerationMixin.prepare_inputs_for_generation`]; with guidance, adds unconditional rows."""
        if guidance is not None:
            names = ("attention_mask", "position_ids")
            rows = guidance.add_unconditional_rows(input_ids, *(kwargs[name] for name in names))
            input_ids, kwargs["attention_mask"], kwargs["position_ids"] = rows
        kwargs |= {"inputs_embeds": inputs_embeds, "mm_encoder_outputs": mm_encoder_outputs}
        model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  # see `generate`
            cast(torch.LongTensor, input_ids), *args, **kwargs
        )
        # transformers withholds images from the first pass of an assistant model, although its prompt holds them.
        step_ids = model_inputs.get("input_ids")
        is_prompt = mm_encoder_outputs and step_ids is not None and step_ids.shape[1] > 1
        if is_prompt and (step_ids == self.config.image_token_id).any():
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return model_inputs

    def _apply_cached_mask(self, options: _Options) -> None:
        """Makes the mask of the call that of what its cache holds.

        Raises:
            ValueError: If it cannot be, which would show empty placeholders to the language model.
        """
        kwargs = options.kwargs
        cache, input_ids, mask = (kwargs.get(name) for name in (CACHE_NAME, "input_ids", "attention_mask"))
        if cache is None or input_ids is None:
            return
        past = self._cached_length(kwargs)
        if isinstance(cache, LavitDynamicCache) and cache.attention_mask is not None:
            new_positions = input_ids.shape[1] - past
            kwargs["attention_mask"] = cache.apply_mask(mask, len(input_ids), new_positions, options.num_rows)
        elif kwargs.get("mm_encoder_outputs") is None:  # An assistant model has no empty placeholders in its cache.
            self._check_cached_images(input_ids[:, :past], mask)

    def _check_cached_images(self, cached_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        padding = self.generation_config.pad_token_id
        is_padding = torch.eq(cached_ids, cached_ids[:, :1] if padding is None else padding)
        for row, ids in enumerate(cached_ids):
            lengths = placeholder_lengths(torch.eq(ids[None], self.config.image_token_id))
            if self.config.visual_tokenizer_config.num_patches not in lengths:
                continue
            mask = full_mask(attention_mask, cached_ids, 0)[row, : len(ids)].bool()
            if (mask | is_padding[row]).all():
                raise ValueError(
                    f"The cache holds an image in row {row}, but attention_mask hides nothing but padding, and "
                    "not the placeholders of dropped patches, which this cache does not know. Pass the "
                    "`attention_mask` of the output that the cache comes with (of `generate`: with "
                    "`return_dict_in_generate=True`), with a one for each id since, or fill a `LavitDynamicCache`, "
                    "which knows it."
                )

    @staticmethod
    def _may_trim(options: _Options, functions: list[Any]) -> bool:
        """Whether a packed prompt may be narrower than the given one.

        It may not if someone counts its positions: a caller who gets a cache, or whose own functions see ids. Steps
        with a static cache are compiled for its length, which must not depend on what is in a picture.
        """
        given = options.kwargs
        functions = [*functions, *(given.get("stopping_criteria") or [])]
        functions += [given.get("prefix_allowed_tokens_fn"), given.get("custom_generate")]
        max_length = options.get("max_length") if options.get("max_new_tokens") is None else None
        return (
            given.get(CACHE_NAME) is None
            and not options.get("return_dict_in_generate")
            and options.get("cache_implementation") in (None, "dynamic", "offloaded", "quantized")
            and all(one is None or getattr(one, "ignores_ids", False) for one in functions)
            and (max_length is None or max_length > given["input_ids"].shape[1])  # transformers complains otherwise
        )

    def _prepare_images(self, options: _Options, functions: list[Any]) -> None:
        """Replaces images in the call by their encoding, and packs rows, without empty placeholders.

        Args:
            options: Of the call.
            functions: What else the caller gave that sees ids.
        """
        kwargs = options.kwargs
        names = ("pixel_values", "image_features", "mm_encoder_outputs", "num_image_tokens", "image_log_prior")
        images = {name: kwargs.pop(name, None) for name in names}
        input_ids = kwargs.get("input_ids")
        past = self._cached_length(kwargs)
        new_ids = None if input_ids is None else input_ids[:, past:]
        if past > 0 and new_ids is not None and not torch.eq(new_ids, self.config.image_token_id).any():
            # An assistant model gets them in every round, cached or not.
            images["mm_encoder_outputs"] = None
        encoded = self.model.encode_images(new_ids, **images)
        if input_ids is not None:
            self.model.check_ids(input_ids)
        if encoded is None or input_ids is None:
            if new_ids is not None:  # the model itself does not look at a single id after cached ones
                self.model.check_no_placeholders(torch.eq(new_ids, self.config.image_token_id))
            return
        kwargs["mm_encoder_outputs"] = {"image": encoded}
        is_empty = find_empty_placeholders(
            torch.eq(input_ids[:, past:], self.config.image_token_id),
            [len(tokens) for tokens in encoded.pooler_output],
            self.config.visual_tokenizer_config.num_patches,
        )
        if is_empty is None:
            return
        width, trim = input_ids.shape[1], self._may_trim(options, functions)
        self._pack_new_ids(kwargs, is_empty, past, trim)
        for name in ("max_length", "min_length"):  # They count the prompt as it was given.
            if trim and options.get(name):
                options.set(name, max(options.get(name) - width + kwargs["input_ids"].shape[1], 0))

    @staticmethod
    def _cached_length(kwargs: dict[str, Any]) -> int:
        """Leading positions of the ids that the cache holds already; none if only new ids were passed."""
        cache, input_ids, mask = (kwargs.get(name) for name in (CACHE_NAME, "input_ids", "attention_mask"))
        if cache is None or input_ids is None or kwargs.get("use_cache") is False:
            return 0
        past, width = int(cache.get_seq_length()), input_ids.shape[1]
        # As transformers has it: where the mask is wider than the ids, these are new ones.
        is_whole = not isinstance(mask, torch.Tensor) or mask.shape[-1] == width
        return past if is_whole and past < width else 0

    def _pack_new_ids(self, kwargs: dict[str, Any], is_empty: torch.Tensor, past: int, trim: bool) -> None:
        if kwargs.get("position_ids") is not None:
            raise ValueError("Leave position_ids out when images have one placeholder per patch.")
        input_ids = kwargs["input_ids"]
        mask = full_mask(kwargs.get("attention_mask"), input_ids, 0)
        num_new = is_empty.shape[1]
        order, packed_mask, source = pack_rows(is_empty, mask[:, -num_new:])
        if trim:
            order, packed_mask, _ = trim_rows(order, packed_mask, source)
        new_ids = input_ids[:, past:].gather(-1, order)
        # Penalties look at padding, too: the first id of a row says nothing new.
        first = new_ids.gather(-1, packed_mask.long().argmax(dim=-1, keepdim=True))
        first = first.masked_fill(torch.eq(first, self.config.image_token_id), self.config.boi_token_id)
        new_ids = torch.where(packed_mask.bool(), new_ids, first)
        kwargs["input_ids"] = torch.cat([input_ids[:, :past], new_ids], dim=1)
        kwargs["attention_mask"] = torch.cat([mask[:, :-num_new], packed_mask], dim=1)

    @staticmethod
    def _complete(output: Any, prompt: torch.Tensor, options: _Options) -> Any:
        """Puts the prompt back as it was given, where `generate` ran on a wider or rewritten one.

        Adds to a `ModelOutput` the mask of what its cache holds, and to the cache if the caller brought none.
        """
        kwargs = options.kwargs
        used, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        num_new = sequences.shape[1] - used.shape[1]
        repeats = len(sequences) // len(prompt)
        if used is not prompt:
            prompt = prompt.repeat_interleave(repeats, dim=0)
            sequences = torch.cat([prompt, sequences[:, used.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        if type(output) not in OUTPUTS:  # of another's `custom_generate`
            return output
        if kwargs.get("mm_encoder_outputs") is not None and kwargs.get(CACHE_NAME) is None:
            known = full_mask(mask, used, 0).repeat_interleave(options.num_rows, dim=0)
            output[CACHE_NAME] = remember_mask(getattr(output, CACHE_NAME), known, is_new=True)
        if mask is not None:
            mask = torch.nn.functional.pad(mask.repeat_interleave(repeats, dim=0), (0, num_new), value=1)
        return OUTPUTS[type(output)](**output, attention_mask=mask)
