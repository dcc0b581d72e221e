"""Decoding loop for visual tokens: classifier-free guidance in one batch, and explicit random generators.

transformers runs guidance as a second forward pass per token. Here every prompt has two rows in one batch: the prompt
itself, and an unconditional twin that sees only the image start and what is drawn after it. `GenerationMixin` prepares
inputs, cache, logits processors and stopping criteria, and then calls a [`VisualSampler`] as its `custom_generate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .configuration_lavit import LavitConfig
from .split_linear import SplitLinears

Generators = torch.Generator | list[torch.Generator] | None


def is_inside_image(input_ids: torch.Tensor, config: LavitConfig) -> torch.Tensor:
    """Whether rows `[batch, sequence]` end inside an image, `[batch]`: the last start comes after the last end."""
    ranks = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last_start = (ranks * torch.eq(input_ids, config.boi_token_id)).amax(dim=-1)
    last_end = (ranks * torch.eq(input_ids, config.eoi_token_id)).amax(dim=-1)
    return last_start > last_end


def add_unconditional_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, config: LavitConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubles a batch: every row gets a twin that sees nothing before its open image.

    Args:
        input_ids: `[batch, sequence]`.
        attention_mask: `[batch, sequence]`.
        config: Its visual ids.

    Returns:
        Ids and mask `[2 * batch, sequence]`, twins last. If a prompt ends outside images, its twin sees the last id.
    """
    ranks = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_start = (ranks * torch.eq(input_ids, config.boi_token_id)).amax(dim=-1)
    first_seen = torch.where(is_inside_image(input_ids, config), last_start, input_ids.shape[1] - 1)
    # Continuous images cannot be seen by a twin, so they need no features there; any other id stands in for them.
    twins = input_ids.masked_fill(torch.eq(input_ids, config.image_token_id), config.boi_token_id)
    twin_mask = (ranks >= first_seen[:, None]).to(attention_mask.dtype)
    return torch.cat([input_ids, twins]), torch.cat([attention_mask, twin_mask])


def add_negative_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    negative_ids: torch.Tensor,
    negative_mask: torch.Tensor | None,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubles a batch with given twins, `[batch or 1, negative sequence]`; pads whichever is shorter on the left.

    Raises:
        ValueError: If there is neither one negative prompt nor one per prompt.
    """
    if len(negative_ids) not in (1, len(input_ids)):
        raise ValueError(
            f"Got {len(negative_ids)} negative prompts for {len(input_ids)} prompts; pass one, or as many."
        )
    negative_ids = negative_ids.expand(len(input_ids), -1).to(input_ids.device)
    mask = torch.ones_like(negative_ids) if negative_mask is None else negative_mask.to(negative_ids)
    mask = mask.expand(len(input_ids), -1).to(attention_mask.dtype)
    width = max(input_ids.shape[1], negative_ids.shape[1])
    return (
        torch.cat([_pad_left(input_ids, width, pad_token_id), _pad_left(negative_ids, width, pad_token_id)]),
        torch.cat([_pad_left(attention_mask, width, 0), _pad_left(mask, width, 0)]),
    )


def _pad_left(rows: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=value)


class SuppressIds(LogitsProcessor):
    """Never generates the given ids; those beyond the vocabulary are ignored.

    transformers' own processor takes them from an option, which may be the user's.
    """

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids = self.ids.to(scores.device)
        return scores.index_fill(-1, self.ids[self.ids < scores.shape[-1]], -torch.inf)


@dataclass
class VisualSampler:
    """Decodes rows of text and visual ids; passed to `generate` as `custom_generate`.

    Args:
        guidance_scale: Weight of guidance on log-probabilities, `unconditional + scale * (conditional -
            unconditional)`; with 1 rows have no twins.
        generator: Draws tokens, one for the batch or one per returned sequence. The global random state is used only
            without it.
        vocab_slice: The model computes logits of ids `[first, last)` only; all others are never generated.
        is_interleaved: Whether rows switch between text and images. Inside an image only codes and its end are
            allowed, and guidance applies; outside only text and the image start.
        streamer: Receives the prompt, then every new id.
        given_processors: Processors of logits that come from the caller, and so know of no twins.

    Raises:
        TypeError: A generator is something else.
        ValueError: `guidance_scale` is not finite.
    """

    guidance_scale: float = 1.0
    generator: Generators = None
    vocab_slice: tuple[int, int] | None = None
    is_interleaved: bool = False
    streamer: BaseStreamer | None = None
    given_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}.")
        given = self.generator if isinstance(self.generator, list) else [self.generator]
        for one in given:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or a list of them, got {type(one).__name__}.")

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Runs the loop; see `GenerationMixin._sample`, whose contract it follows.

        Args:
            model: The model that generates.
            input_ids: Prompts, `[rows, sequence]`, their twins last.
            logits_processor: Applied to scores `[batch, vocabulary]`, twins not included.
            stopping_criteria: Decide per prompt.
            generation_config: Prepared by `generate`.
            model_kwargs: Model inputs beside the ids.
        """
        rows, batch_size = input_ids, len(input_ids) // (2 if self.is_guided else 1)
        self._check_generators(batch_size)
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError(
                "Attentions and hidden states are not returned here: call the model itself on the ids that were drawn."
            )
        if self.is_guided:
            self._forget_twins(logits_processor)
        inside = is_inside_image(rows[:batch_size], model.config)
        image_lengths = torch.zeros_like(inside, dtype=torch.long)
        unfinished = torch.ones_like(inside)
        scores: tuple[torch.Tensor, ...] = ()
        logits: tuple[torch.Tensor, ...] = ()
        if self.streamer is not None:
            self.streamer.put(rows[:batch_size].cpu())
        is_compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = model.get_compiled_call(generation_config.compile_config) if is_compiled else model.__call__
        is_on_cpu = rows.device.type == "cpu" and not is_compiled
        linears = SplitLinears(model.model.language_model) if is_on_cpu else nullcontext()
        if self.is_interleaved and self.is_guided and model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = torch.ones_like(rows)  # `generate` drops masks without zeros.
        outputs = model._prefill(rows, generation_config, model_kwargs, is_first_iteration=True)
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            next_logits = self._combine(outputs.logits[:, -1].float().to(rows.device), inside, model.config)
            if self.is_interleaved:
                next_logits = next_logits.masked_fill(self._forbidden(inside, image_lengths, model), -torch.inf)
            next_scores = logits_processor(rows[:batch_size], next_logits)
            may_end = generation_config._pad_token_tensor is not None
            next_ids = self._pick(next_scores, generation_config.do_sample, unfinished if may_end else None)
            if may_end:
                next_ids = torch.where(unfinished, next_ids, generation_config._pad_token_tensor.to(rows.device))
            if generation_config.return_dict_in_generate:
                scores += (next_scores,) if generation_config.output_scores else ()
                logits += (next_logits,) if generation_config.output_logits else ()
            rows = torch.cat([rows, next_ids.repeat(len(rows) // batch_size)[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(next_ids.cpu())
            if self.is_interleaved:
                self._hide_past_of_twins(inside, model_kwargs)
                inside = (inside & (next_ids != model.config.eoi_token_id)) | (next_ids == model.config.boi_token_id)
                image_lengths = torch.where(inside, image_lengths + 1, 0)
            unfinished = unfinished & ~stopping_criteria(rows[:batch_size], scores)
            if not unfinished.any():
                break
            del outputs
            step = 1 if model_kwargs["use_cache"] else None
            model_inputs = model.prepare_inputs_for_generation(rows, next_sequence_length=step, **model_kwargs)
            with linears:
                outputs = forward(**model_inputs, return_dict=True)
        if self.streamer is not None:
            self.streamer.end()
        cache = self._without_twins(model_kwargs.get("past_key_values"), batch_size)
        if not generation_config.return_dict_in_generate:
            return rows[:batch_size]
        return GenerateDecoderOnlyOutput(
            sequences=rows[:batch_size],
            scores=scores or None,
            logits=logits or None,
            past_key_values=cache,
        )

    def _combine(self, logits: torch.Tensor, inside: torch.Tensor, config: LavitConfig) -> torch.Tensor:
        """Applies guidance and spreads logits over the vocabulary: `[rows, computed]` -> `[batch, vocabulary]`."""
        if self.is_guided:
            conditional, unconditional = logits.log_softmax(dim=-1).chunk(2)
            guided = torch.lerp(unconditional, conditional, self.guidance_scale)
            logits = torch.where(inside[:, None], guided, conditional) if self.is_interleaved else guided
        if self.vocab_slice is None:
            return logits
        everything = logits.new_full((len(logits), config.text_config.vocab_size), -torch.inf)
        everything[:, slice(*self.vocab_slice)] = logits
        return everything

    def _forbidden(self, inside: torch.Tensor, image_lengths: torch.Tensor, model: Any) -> torch.Tensor:
        """Ids that a row cannot go on with, `[batch, vocabulary]`."""
        config = model.config
        is_visual = torch.zeros(config.text_config.vocab_size, dtype=torch.bool, device=inside.device)
        is_visual[config.visual_token_ids] = True
        in_text, in_image, at_limit = is_visual.clone(), ~is_visual, torch.ones_like(is_visual)
        in_text[config.boi_token_id], in_image[config.boi_token_id] = False, True
        at_limit[config.eoi_token_id] = False
        forbidden = torch.where(inside[:, None], in_image, in_text)
        # `image_lengths` counts the start, too: as many codes as there are patches may follow it.
        is_full = image_lengths > config.visual_tokenizer_config.num_patches
        return torch.where(is_full[:, None], at_limit, forbidden)

    def _hide_past_of_twins(self, inside: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Twins outside images see only their newest id, so that an image that starts has no context but its start."""
        if not self.is_guided:
            return
        outside = torch.cat([torch.zeros_like(inside), ~inside])
        mask = model_kwargs["attention_mask"]
        mask[:, :-1] = mask[:, :-1].masked_fill(outside[:, None], 0)
        if model_kwargs.get("position_ids") is not None:
            positions = model_kwargs["position_ids"]
            positions[:, -1] = positions[:, -1].masked_fill(outside, 0)

    def _pick(self, scores: torch.Tensor, do_sample: bool, unfinished: torch.Tensor | None) -> torch.Tensor:
        """Chooses the next id of every row, `[batch, vocabulary]` -> `[batch]`; of finished rows it means nothing."""
        if not do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        if not isinstance(self.generator, list):
            return _draw(probabilities, self.generator)
        # The generator of a finished row stays where it is: what is drawn from it later must not depend on how long
        # the others are.
        picked = scores.new_zeros(len(scores), dtype=torch.long)
        for row in range(len(scores)) if unfinished is None else unfinished.nonzero().flatten().tolist():
            picked[row] = _draw(probabilities[row, None], self.generator[row])[0]
        return picked

    def _check_generators(self, batch_size: int) -> None:
        if isinstance(self.generator, list) and len(self.generator) != batch_size:
            raise ValueError(
                f"Got {len(self.generator)} generators for {batch_size} sequences; pass one, or one per sequence."
            )

    def _without_twins(self, cache: Any, batch_size: int) -> Any:
        if self.is_guided and cache is not None:
            cache.reorder_cache(torch.arange(batch_size))  # `batch_select_indices` is for dynamic caches only
        return cache

    def _forget_twins(self, logits_processor: LogitsProcessorList) -> None:
        """Fits processors to prompts without twins: some of transformers' remember all rows that they were made with.

        A repetition penalty remembers one row per returned sequence, the others one per prompt; twins are the second
        half of either.
        """
        for processor in logits_processor:
            if any(processor is given for given in self.given_processors):
                continue
            for name in ("prompt_ignore_length", "encoder_input_ids"):
                if isinstance(rows := getattr(processor, name, None), torch.Tensor):
                    setattr(processor, name, rows[: len(rows) // 2])
            if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
                processor.batch_size //= 2  # of its n-grams, one entry per prompt, it takes the first then


def _draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = probabilities.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator)[:, 0].to(probabilities.device)
