"""Generation with images: they are encoded once, before the loop of `GenerationMixin` starts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_mask import apply_remembered_mask, forget_mask, remember_mask
from .image_placeholders import find_empty_placeholders, full_mask, pack_rows
from .visual_sampling import (
    Generators,
    SuppressIds,
    VisualSampler,
    add_negative_rows,
    add_unconditional_rows,
    is_inside_image,
)

GENERATION_MODES = ("text", "image", "interleaved")


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

    def set(self, name: str, value: Any) -> None:
        """Sets an option where the call has its own."""
        if self.generation_config is None:
            self.kwargs[name] = value
        else:
            self.kwargs.pop(name, None)
            setattr(self.generation_config, name, value)


class LavitGenerationMixin(GenerationMixin):
    """`generate` for prompts with images, in both forms that the processor gives them, and for drawing."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        generation_mode: str | None = None,
        generator: Generators = None,
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
            kwargs: Model inputs (what the processor returned) and generation options, see
                [`GenerationMixin.generate`]. When drawing, `guidance_scale` applies classifier-free guidance in one
                batch; the unconditional context is the image start alone, or `negative_prompt_ids`.

        Returns:
            Prompt and new ids, `[batch * num_return_sequences, sequence + new]`, or a `ModelOutput` as in
            [`GenerationMixin.generate`]. The prompt comes back as it was given.

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
        self._restore_cached_mask(kwargs)
        prompt = kwargs.get("input_ids")
        if prompt is not None and prompt.shape[-1] == 0:
            raise ValueError("The prompt is empty: input_ids hold no id. For a caption, put an image into it.")
        new_mask = self._prepare_images(kwargs)
        self._check_assistant(kwargs)
        options = _Options(generation_config, self.generation_config, kwargs)
        if options.get("pad_token_id") == self.config.image_token_id:
            raise ValueError(
                f"pad_token_id={self.config.image_token_id} is the placeholder of continuous images: padding with it "
                "would read as an image. Leave it out, or pad with the end of text."
            )
        sampler = self._build_sampler(mode, generator, options)
        processors = LogitsProcessorList(logits_processor or [])
        processors.append(SuppressIds(self._forbidden_ids(mode, sampler, options)))
        if sampler is not None:
            sampler.given_processors = tuple(logits_processor or ())
            kwargs["custom_generate"] = sampler
        output = super().generate(None, options.generation_config, processors, *args, **kwargs)
        return self._restore_prompt(output, prompt, kwargs.get("input_ids"), new_mask)

    def _forbidden_ids(self, mode: str, sampler: VisualSampler | None, options: _Options) -> list[int]:
        """Ids that the mode never generates; the placeholder is one even after the embeddings have been resized."""
        forbidden = [self.config.image_token_id]
        if mode == "text":
            forbidden += self.config.visual_token_ids
        elif mode == "image" and sampler.vocab_slice is None and options.get("suppress_tokens") is None:
            allowed = set(self._drawable_ids())
            forbidden += [id for id in range(self.config.text_config.vocab_size) if id not in allowed]
        elif mode == "image":  # tokens that a user added are no part of an image, whatever else may be drawn
            after_codes = self.config.visual_token_offset + self.config.visual_tokenizer_config.codebook_size
            forbidden += range(after_codes, self.config.text_config.vocab_size)
        return forbidden

    def _drawable_ids(self) -> list[int]:
        start = self.config.boi_token_id  # looked up once: attributes of a configuration are slow
        return [id for id in self.config.visual_token_ids if id != start]

    def _build_sampler(self, mode: str, generator: Generators, options: _Options) -> VisualSampler | None:
        """Takes from the options what only our own decoding loop understands.

        Returns:
            The loop to use, or `None` if that of `GenerationMixin` will do.
        """
        kwargs = options.kwargs
        if mode == "text":
            if generator is None:
                return None
            self._check_one_by_one(options, "generator")
            return VisualSampler(generator=generator, streamer=kwargs.pop("streamer", None))
        self._check_one_by_one(options, f"generation_mode={mode!r}")
        guidance_scale = options.get("guidance_scale")
        sampler = VisualSampler(
            guidance_scale=1.0 if guidance_scale is None else float(guidance_scale),
            generator=generator,
            is_interleaved=mode == "interleaved",
            streamer=kwargs.pop("streamer", None),
        )
        options.set("guidance_scale", 1.0)  # Otherwise transformers would run its own guidance on top.
        if mode == "image":
            self._prepare_drawing(sampler, options)
        if sampler.is_guided:
            self._add_twins(mode, options)
        elif kwargs.pop("negative_prompt_ids", None) is not None:
            raise ValueError("negative_prompt_ids have no effect without guidance_scale.")
        return sampler

    def _prepare_drawing(self, sampler: VisualSampler, options: _Options) -> None:
        input_ids = options.kwargs.get("input_ids")
        if input_ids is None or not is_inside_image(input_ids, self.config).all():
            raise ValueError(
                'To draw, prompts have to end with the image start. Use `processor(..., generation_mode="image")`; '
                'a pipeline of transformers needs `processor_kwargs={"generation_mode": "image"}` as well.'
            )
        if options.kwargs.get("eos_token_id") is None:
            options.set("eos_token_id", self.config.eoi_token_id)
        if options.get("max_new_tokens") is None and not options.get("max_length"):
            options.set("max_new_tokens", self.config.visual_tokenizer_config.num_patches + 1)
        drawable = self._drawable_ids()
        is_contiguous = drawable == list(range(drawable[0], drawable[-1] + 1))
        if options.get("suppress_tokens") is None and is_contiguous:
            sampler.vocab_slice = options.kwargs["vocab_slice"] = (drawable[0], drawable[-1] + 1)

    def _add_twins(self, mode: str, options: _Options) -> None:
        kwargs = options.kwargs
        input_ids = kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        is_filled = cache is not None and int(cache.get_seq_length()) > 0
        if input_ids is None or is_filled or kwargs.get("position_ids") is not None:
            raise ValueError(
                "Guidance needs input_ids, and can go on neither from filled past_key_values nor with given "
                "position_ids."
            )
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        negative_ids = kwargs.pop("negative_prompt_ids", None)
        negative_mask = kwargs.pop("negative_prompt_attention_mask", None)
        if negative_ids is None:
            kwargs["input_ids"], kwargs["attention_mask"] = add_unconditional_rows(input_ids, mask, self.config)
            return
        if mode != "image":
            raise ValueError(f"negative_prompt_ids are for generation_mode='image', not {mode!r}.")
        kwargs["input_ids"], kwargs["attention_mask"] = add_negative_rows(
            input_ids, mask, negative_ids, negative_mask, self._padding_id()
        )

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
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if options.get(name):
                raise ValueError(f"{what} cannot be combined with {name}: ids are generated one by one.")

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        # Penalties that compare with the prompt look its ids up in the scores, where placeholders of old are not.
        # Images begin with their start, so that this one says nothing new.
        if encoder_input_ids is not None and not encoder_input_ids.is_floating_point():  # else: embeddings
            is_placeholder = encoder_input_ids == self.config.image_token_id
            encoder_input_ids = encoder_input_ids.masked_fill(is_placeholder, self.config.boi_token_id)
        return super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See [`GenerationMixin.prepare_inputs_for_generation`]."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )
        # transformers withholds images from the first pass of an assistant model, although its prompt holds them.
        step_ids = model_inputs.get("input_ids")
        is_prompt = mm_encoder_outputs and step_ids is not None and step_ids.shape[1] > 1
        if is_prompt and (step_ids == self.config.image_token_id).any():
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return model_inputs

    def _restore_cached_mask(self, kwargs: dict[str, Any]) -> None:
        cache, input_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if input_ids is None or cache is None:
            return
        mask = kwargs.get("attention_mask")
        new_positions = input_ids.shape[1] - int(cache.get_seq_length())
        kwargs["attention_mask"] = apply_remembered_mask(mask, cache, len(input_ids), new_positions)
        forget_mask(cache)  # `generate` carries the mask on from here, also when it repeats rows for beams.

    def _prepare_images(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Replaces images in `kwargs` by their encoding, and light rows by attached ones.

        Returns:
            The new attention mask if rows were rewritten.
        """
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features", "mm_encoder_outputs")}
        input_ids = kwargs.get("input_ids")
        past = self._cached_length(kwargs, input_ids)
        new_ids = None if input_ids is None else input_ids[:, past:]
        if past > 0 and not torch.eq(new_ids, self.config.image_token_id).any():
            # An assistant model gets them in every round, cached or not.
            images["mm_encoder_outputs"] = None
        encoded = self.model.encode_images(new_ids, **images)
        if input_ids is not None:
            self.model._check_ids(input_ids)
        if encoded is None or input_ids is None:
            if new_ids is not None:  # the model itself does not look at a single id after cached ones
                self.model._check_no_placeholders(torch.eq(new_ids, self.config.image_token_id))
            return None
        kwargs["mm_encoder_outputs"] = {"image": encoded}
        is_empty = find_empty_placeholders(
            torch.eq(input_ids[:, past:], self.config.image_token_id),
            [len(tokens) for tokens in encoded.pooler_output],
            self.config.visual_tokenizer_config.num_patches,
        )
        return None if is_empty is None else self._pack_new_ids(kwargs, is_empty, past)

    @staticmethod
    def _cached_length(kwargs: dict[str, Any], input_ids: torch.Tensor | None) -> int:
        """Leading positions of `input_ids` that `past_key_values` holds already."""
        cache = kwargs.get("past_key_values")
        if cache is None or input_ids is None or kwargs.get("use_cache") is False:
            return 0
        past = int(cache.get_seq_length())
        return past if past < input_ids.shape[1] else 0

    def _pack_new_ids(self, kwargs: dict[str, Any], is_empty: torch.Tensor, past: int) -> torch.Tensor:
        if kwargs.get("position_ids") is not None:
            raise ValueError("Leave position_ids out when images have one placeholder per patch.")
        input_ids = kwargs["input_ids"]
        mask = full_mask(kwargs.get("attention_mask"), input_ids, 0)
        order, packed_mask, _ = pack_rows(is_empty, mask[:, past:])
        new_ids = input_ids[:, past:].masked_fill(is_empty, self._padding_id()).gather(-1, order)
        kwargs["input_ids"] = torch.cat([input_ids[:, :past], new_ids], dim=1)
        kwargs["attention_mask"] = torch.cat([mask[:, :past], packed_mask], dim=1)
        return kwargs["attention_mask"]

    @staticmethod
    def _restore_prompt(
        output: Any, prompt: torch.Tensor | None, used: torch.Tensor | None, new_mask: torch.Tensor | None
    ) -> Any:
        """Puts the prompt back as it was given, where `generate` ran on a wider or rewritten one."""
        if prompt is None or used is None:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        sequences = sequences[:, used.shape[1] - prompt.shape[1] :]
        repeats = len(sequences) // len(prompt)
        if new_mask is not None:
            sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(repeats, dim=0)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        if (
            new_mask is not None
            and isinstance(output, GenerateDecoderOnlyOutput)
            and output.past_key_values is not None
        ):
            remember_mask(output.past_key_values, new_mask.repeat_interleave(repeats, dim=0))
        return output
