"""Generation with images: they are encoded once, before the loop of `GenerationMixin` starts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_mask import apply_remembered_mask, forget_mask, remember_mask
from .image_placeholders import find_empty_placeholders, move_empty_to_left, split_image_features
from .visual_sampling import (
    Generators,
    VisualSampler,
    add_negative_rows,
    add_unconditional_rows,
    is_inside_image,
)

GENERATION_MODES = ("text", "image", "interleaved")


class LavitGenerationMixin(GenerationMixin):
    """`generate` for prompts with images, in both forms that the processor gives them, and for drawing."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        generation_mode: str | None = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> torch.Tensor | Any:
        """Generates text, visual tokens, or both, from text and images.

        Args:
            inputs: Prompt ids, `[batch, sequence]`; or pass `input_ids`.
            generation_config: See [`GenerationMixin.generate`].
            args: See [`GenerationMixin.generate`].
            generation_mode: `"text"` (default) never generates visual ids. `"image"` draws one image after a prompt
                that ends with an image start (the processor's `generation_mode="image"`): only codes and the image end
                are generated, and each row stops at its end. `"interleaved"` goes on with text and images. In the
                first two modes `suppress_tokens` replaces what is forbidden by default.
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
        configured = generation_config if generation_config is not None else self.generation_config
        self._restore_cached_mask(kwargs)
        prompt = kwargs.get("input_ids")
        new_mask = self._prepare_images(kwargs)
        sampler = self._build_sampler(mode, generator, configured, kwargs)
        if sampler is None:
            output = super().generate(None, generation_config, *args, **kwargs)
        else:
            output = super().generate(None, generation_config, *args, custom_generate=sampler, **kwargs)
        return self._restore_prompt(output, prompt, kwargs.get("input_ids"), new_mask)

    def _build_sampler(
        self, mode: str, generator: Generators, configured: GenerationConfig, kwargs: dict[str, Any]
    ) -> VisualSampler | None:
        """Sets what the mode forbids, and takes from `kwargs` what only our own decoding loop understands.

        Returns:
            The loop to use, or `None` if that of `GenerationMixin` will do.
        """

        def option(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(configured, name, None)

        has_own_rules = option("suppress_tokens") is not None
        if mode == "text":
            if not has_own_rules:
                kwargs["suppress_tokens"] = self.config.visual_token_ids
            if generator is None:
                return None
            self._check_no_beams(option("num_beams"), "generator")
            return VisualSampler(generator=generator, streamer=kwargs.pop("streamer", None))

        guidance_scale = option("guidance_scale")
        guidance_scale = 1.0 if guidance_scale is None else float(guidance_scale)
        kwargs["guidance_scale"] = 1.0  # Otherwise transformers would run its own guidance on top.
        self._check_no_beams(option("num_beams"), f"generation_mode={mode!r}")
        sampler = VisualSampler(
            guidance_scale=guidance_scale,
            generator=generator,
            is_interleaved=mode == "interleaved",
            streamer=kwargs.pop("streamer", None),
        )
        if mode == "image":
            self._prepare_drawing(sampler, has_own_rules, configured, kwargs)
        if sampler.is_guided:
            self._add_twins(mode, configured, kwargs)
        elif kwargs.pop("negative_prompt_ids", None) is not None:
            raise ValueError("negative_prompt_ids have no effect without guidance_scale.")
        return sampler

    def _prepare_drawing(
        self, sampler: VisualSampler, has_own_rules: bool, configured: GenerationConfig, kwargs: dict[str, Any]
    ) -> None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None or not is_inside_image(input_ids, self.config).all():
            raise ValueError(
                'To draw, every prompt has to end with the image start. Use `processor(..., generation_mode="image")`.'
            )
        kwargs.setdefault("eos_token_id", self.config.eoi_token_id)
        lengths = ("max_new_tokens", "max_length")
        if not any(kwargs.get(name) or getattr(configured, name, None) for name in lengths):
            kwargs["max_new_tokens"] = self.config.visual_tokenizer_config.num_patches + 1
        if has_own_rules:
            return
        allowed = [id for id in self.config.visual_token_ids if id != self.config.boi_token_id]
        if allowed == list(range(allowed[0], allowed[-1] + 1)):
            sampler.vocab_slice = kwargs["vocab_slice"] = (allowed[0], allowed[-1] + 1)
        else:
            everything = range(self.config.text_config.vocab_size)
            kwargs["suppress_tokens"] = sorted(set(everything) - set(allowed))

    def _add_twins(self, mode: str, configured: GenerationConfig, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None or kwargs.get("past_key_values") is not None or kwargs.get("position_ids") is not None:
            raise ValueError(
                "Guidance needs input_ids, and can go on neither from past_key_values nor with given position_ids."
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
        pad_token_id = configured.pad_token_id if configured.pad_token_id is not None else 0
        kwargs["input_ids"], kwargs["attention_mask"] = add_negative_rows(
            input_ids, mask, negative_ids, negative_mask, pad_token_id
        )

    @staticmethod
    def _check_no_beams(num_beams: int | None, what: str) -> None:
        if (num_beams or 1) > 1:
            raise ValueError(f"{what} cannot be combined with num_beams={num_beams}; sample or decode greedily.")

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
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        given = {name: value for name, value in images.items() if value is not None}
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if not given and encoded is None:
            return None
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("Images need input_ids: embeddings do not show where the images go.")
        if len(given) + (encoded is not None) > 1:
            raise ValueError("Pass images once: as pixel_values, image_features or mm_encoder_outputs.")
        is_placeholder = input_ids == self.config.image_token_id
        if encoded is None:
            if "image_features" in given:
                given["num_image_tokens"] = split_image_features(is_placeholder, given["image_features"])
            encoded = self.get_image_features(**given, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        num_patches = self.config.visual_tokenizer_config.num_patches
        num_tokens = [len(tokens) for tokens in encoded.pooler_output]
        is_empty = find_empty_placeholders(is_placeholder, num_tokens, num_patches)
        if is_empty is None:
            return None
        return self._rewrite_rows(kwargs, is_empty)

    def _rewrite_rows(self, kwargs: dict[str, Any], is_empty: torch.Tensor) -> torch.Tensor:
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "position_ids cannot be given when images have one placeholder per patch; leave them out."
            )
        order, attention_mask = move_empty_to_left(is_empty, kwargs.get("attention_mask"))
        # Any text id does for the padding, it only must not be a placeholder.
        input_ids = kwargs["input_ids"].masked_fill(is_empty, 0)
        kwargs["input_ids"], kwargs["attention_mask"] = input_ids.gather(-1, order), attention_mask
        return attention_mask

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
