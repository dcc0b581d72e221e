"""Generation with images: they are encoded once, before the loop of `GenerationMixin` starts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_mask import apply_remembered_mask, forget_mask, remember_mask
from .image_placeholders import find_empty_placeholders, move_empty_to_left, split_image_features

GENERATION_MODES = ("text",)


class LavitGenerationMixin(GenerationMixin):
    """`generate` for prompts with images, in both forms that the processor gives them."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | Any:
        """Generates from text and images.

        Args:
            inputs: Prompt ids, `[batch, sequence]`; or pass `input_ids`.
            generation_config: See [`GenerationMixin.generate`].
            args: See [`GenerationMixin.generate`].
            generation_mode: `"text"` (default) never generates visual ids, unless `suppress_tokens` is given, which
                then says what is never generated.
            kwargs: Model inputs (what the processor returned) and generation options, see
                [`GenerationMixin.generate`].

        Returns:
            Prompt and new ids, `[batch * num_return_sequences, sequence + new]`, or a `ModelOutput` as in
            [`GenerationMixin.generate`]. The prompt comes back as it was given.

        Raises:
            ValueError: If the mode is unknown, or prompts and images do not fit together.
        """
        if (generation_mode or "text") not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {generation_mode!r}.")
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("Pass the prompt either as inputs or as input_ids.")
            kwargs["input_ids"] = inputs
        self._suppress_visual_tokens(generation_config, kwargs)
        self._restore_cached_mask(kwargs)
        prompt = kwargs.get("input_ids")
        new_mask = self._prepare_images(kwargs)
        output = super().generate(None, generation_config, *args, **kwargs)
        if prompt is None or new_mask is None:
            return output
        return self._restore_prompt(output, prompt, new_mask)

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

    def _suppress_visual_tokens(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        configured = generation_config if generation_config is not None else self.generation_config
        if kwargs.get("suppress_tokens") is None and configured.suppress_tokens is None:
            kwargs["suppress_tokens"] = self.config.visual_token_ids

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
    def _restore_prompt(output: Any, prompt: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        repeats = len(sequences) // len(prompt)
        sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(repeats, dim=0)
        if isinstance(output, GenerateDecoderOnlyOutput) and output.past_key_values is not None:
            remember_mask(output.past_key_values, attention_mask.repeat_interleave(repeats, dim=0))
        return output
