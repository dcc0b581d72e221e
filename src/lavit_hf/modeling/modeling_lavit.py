"""LaVIT: a language model that reads images as continuous features or as words of its vocabulary."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .cache_lavit import CACHE_NAME, LavitDynamicCache, find_cache, name_cache, remember_mask
from .checkpoint_files import CheckedLoadingMixin
from .configuration_lavit import LavitConfig
from .generation_lavit import LavitGenerationMixin
from .image_placeholders import (
    find_empty_placeholders,
    full_mask,
    pack_rows,
    split_image_features,
    trim_rows,
)
from .modeling_lavit_merger import gather_positions
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .remote_code_mixin import import_composition

logger = logging.get_logger(__name__)


@dataclass
class LavitImageFeatures(BaseModelOutputWithPooling):
    """Images in the language model's embedding space.

    Args:
        last_hidden_state: Features of the vision encoder, `[images, num_patches, hidden]`; `None` if features were
            handed over.
        pooler_output: One tensor `[tokens, text hidden]` per image.
        keep_mask: True where a patch became a token, `[images, num_patches]`; `None` if features were handed over.
    """

    pooler_output: list[torch.Tensor] = None  # type: ignore[assignment]  # one per image, as in all models now
    keep_mask: torch.Tensor | None = None


@dataclass
class LavitModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model.

    Args:
        last_hidden_state: States of the last layer, `[batch, sequence, text hidden]`. They are zeros at placeholders
            of dropped patches and, while training, from the start of a continuous image up to its end: what comes next
            there is given, and no loss learns it.
        image_hidden_states: Projected features of all images, `[total tokens, text hidden]`.
        attention_mask: With one placeholder per patch: the mask of the cached positions, `[batch, past + sequence]`,
            to go on from the cache. Rows are packed to the right there, without empty placeholders, and
            `attentions` are those of the packed rows. Otherwise `None`.
    """

    image_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


@dataclass
class LavitCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output with logits over the whole vocabulary, text and visual ids.

    Args:
        image_hidden_states: Projected features of all images, `[total tokens, text hidden]`.
        attention_mask: With one placeholder per patch: the mask of the cached positions, `[batch, past + sequence]`,
            to go on from the cache. Rows are packed to the right there, without empty placeholders, and
            `attentions` are those of the packed rows. Otherwise `None`.
    """

    image_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


class LavitPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    """Loading, saving and initialization of LaVIT models."""

    config: LavitConfig
    config_class = LavitConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = [*LavitVisualTokenizer._no_split_modules, "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class LavitModel(LavitPreTrainedModel):
    """Language model and visual tokenizer, without a language modeling head."""

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        self.visual_tokenizer = LavitVisualTokenizer(config.visual_tokenizer_config)
        self.language_model = AutoModel.from_config(config.text_config)
        embeddings: Any = self.get_input_embeddings()
        self.multi_modal_projector = nn.Linear(config.visual_tokenizer_config.hidden_size, embeddings.weight.shape[-1])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """See [`PreTrainedModel.get_encoder`]; images are encoded by the visual tokenizer."""
        return self.visual_tokenizer if modality == "image" else super().get_encoder(modality)

    def set_encoder(self, encoder: Any, modality: str | None = None) -> None:
        """See [`PreTrainedModel.set_encoder`]."""
        if modality == "image":
            self.visual_tokenizer = encoder
        else:
            super().set_encoder(encoder, modality)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_image_tokens: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LavitImageFeatures:
        """Encodes images for the language model, by the visual tokenizer's continuous branch.

        Args:
            pixel_values: Preprocessed images, `[images, channels, height, width]`.
            image_features: What the visual tokenizer's `embed` gave for them, `[total tokens, vision hidden]`, to
                project only.
            num_image_tokens: Tokens of every image, `[images]`. Of pixels so many patches are kept; by default the
                selector decides how many. `image_features` are of one image by default.
            kwargs: For the visual tokenizer's `embed`, such as `keep_rate` and `output_hidden_states`.

        Returns:
            [`LavitImageFeatures`], whose `pooler_output` is a list of `[tokens, text hidden]`, one per image.

        Raises:
            ValueError: If not exactly one of `pixel_values` and `image_features` is given.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Pass either pixel_values or image_features.")
        output = LavitImageFeatures()
        if pixel_values is not None:
            tokens = self.visual_tokenizer.embed(pixel_values, num_tokens=num_image_tokens, **kwargs)
            assert tokens.num_tokens is not None
            image_features, num_image_tokens = tokens.features, tokens.num_tokens.tolist()
            output.last_hidden_state, output.keep_mask = tokens.patch_features, tokens.keep_mask
            output.hidden_states, output.attentions = tokens.hidden_states, tokens.attentions
        assert image_features is not None
        # If the projection is quantized, its weights are of 8 bits, or called something else; its inputs are not.
        dtype = getattr(getattr(self.multi_modal_projector, "weight", None), "dtype", torch.int8)
        is_plain = dtype.is_floating_point and dtype.itemsize > 1
        projected = self.multi_modal_projector(image_features.to(dtype if is_plain else self.dtype))
        lengths = [len(projected)] if num_image_tokens is None else [int(count) for count in num_image_tokens]
        output.pooler_output = list(projected.split(lengths))
        return output

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs have position_ids, too
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, LavitImageFeatures] | None = None,
        num_image_tokens: torch.Tensor | None = None,
        image_log_prior: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitModelOutputWithPast:
        """
        Args:
            input_ids: Ids of text, visual codes and image placeholders, `[batch, sequence]`.
            pixel_values: Images of the placeholders, in order, `[images, channels, height, width]`.
            image_features: The images as the visual tokenizer encoded them (`features` of its `embed`),
                `[total tokens, vision hidden]`; instead of `pixel_values`.
            attention_mask: Mask of real tokens, `[batch, past + sequence]`, or a 4D mask if no image has empty
                placeholders.
            position_ids: Positions, `[batch, sequence]`; by default they count real tokens.
            cache: Cache of an earlier call. After images with one placeholder per patch, a
                [`LavitDynamicCache`], which is what calls without a cache return, knows which of its positions are
                empty; with any other, the mask of what it holds has to be the `attention_mask` of the output.
            inputs_embeds: Embeddings instead of ids, `[batch, sequence, text hidden]`; images must be in them already.
            mm_encoder_outputs: `{"image": output of get_image_features}`, instead of `pixel_values`.
            num_image_tokens: Tokens that every image of `pixel_values` becomes, `[images]`, which has as many
                placeholders then. By default the selector decides, and there is one placeholder per patch.
            image_log_prior: Added to the selector's log-odds of keeping, `[images, num_patches]`.
            past_key_values: What `cache` was called before transformers 5.24; both names are taken in every version.
            kwargs: Passed on to the language model.

        Raises:
            ValueError: If ids and embeddings, or placeholders and images, do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        cache = find_cache(cache, past_key_values)
        images = self.encode_images(
            input_ids, pixel_values, image_features, mm_encoder_outputs, num_image_tokens, image_log_prior
        )
        is_empty = image_hidden_states = None
        if input_ids is not None:
            is_step = cache is not None and input_ids.shape[1] == 1
            inputs_embeds, image_hidden_states, is_empty = self._embed(input_ids, images, is_step)
        assert inputs_embeds is not None
        batch_size, new_positions = inputs_embeds.shape[:2]
        source = None
        past = 0 if cache is None or images is None else int(cache.get_seq_length())
        if is_empty is not None:
            self._check_free_positions(position_ids)
            attention_mask = full_mask(attention_mask, is_empty, past)
            if tuple(attention_mask.shape) != (batch_size, past + new_positions):
                raise ValueError(
                    f"attention_mask must be {[batch_size, past + new_positions]}, one value for every cached and "
                    f"every new position; got {list(attention_mask.shape)}."
                )
            side = "right" if self.training and past == 0 else "left"
            order, packed_mask, source = pack_rows(is_empty, attention_mask[:, -new_positions:], side)
            if cache is None and kwargs.get("use_cache") is False:
                # Without a cache nobody counts positions: what is padding in all rows, most placeholders, can go.
                order, packed_mask, source = trim_rows(order, packed_mask, source, side)
            inputs_embeds = gather_positions(inputs_embeds, order)
            attention_mask = torch.cat([attention_mask[:, :-new_positions], packed_mask], dim=1)
        if isinstance(cache, LavitDynamicCache):
            attention_mask = cache.apply_mask(attention_mask, batch_size, new_positions)
        is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if position_ids is None and attention_mask is not None and is_2d:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -inputs_embeds.shape[1] :]

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **name_cache(cache),
            **kwargs,
        )
        filled = getattr(outputs, CACHE_NAME)
        if input_ids is not None and images is not None and (is_2d or attention_mask is None):
            mask = full_mask(attention_mask, input_ids, past)
            filled = remember_mask(filled, mask, is_new=cache is None)
        if is_empty is not None and filled is not None and not isinstance(filled, LavitDynamicCache):
            logger.warning_once(
                f"A {type(filled).__name__} does not know which image placeholders are empty. Go on from it with the "
                "`attention_mask` of this output, or fill a `LavitDynamicCache`, which knows it."
            )
        last_hidden_state = _unpack(outputs.last_hidden_state, source)
        if self.training and images is not None:
            assert input_ids is not None
            # Nothing is to be learned there, also not by a library that labels it and applies the head itself.
            is_given = self._inside_images(input_ids)[..., None].to(last_hidden_state.device)
            last_hidden_state = last_hidden_state.masked_fill(is_given, 0)
        return LavitModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            hidden_states=outputs.hidden_states and tuple(_unpack(state, source) for state in outputs.hidden_states),
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            attention_mask=attention_mask if is_empty is not None else None,
            **name_cache(filled),
        )

    def _embed(
        self, input_ids: torch.Tensor, images: LavitImageFeatures | None, is_step: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Embeds ids and puts images in place of their placeholders.

        Returns:
            Embeddings `[batch, sequence, text hidden]`, the images in them `[total tokens, text hidden]`, and a mask
            `[batch, sequence]` of placeholders without a token; the last two are `None` where there are none.
        """
        is_placeholder = torch.eq(input_ids, self.config.image_token_id)
        if not is_step:
            self.check_ids(input_ids)
        # The placeholder may have no row in the embedding table, see `LavitConfig`.
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if images is None:
            if not is_step:
                self.check_no_placeholders(is_placeholder)
            return inputs_embeds, None, None
        num_tokens = [len(tokens) for tokens in images.pooler_output]
        num_patches = self.config.visual_tokenizer_config.num_patches
        is_empty = find_empty_placeholders(is_placeholder, num_tokens, num_patches)
        empty = inputs_embeds.new_empty(0, inputs_embeds.shape[-1])  # Perhaps no image has a token.
        image_hidden_states = torch.cat([empty, *(tokens.to(empty) for tokens in images.pooler_output)])
        is_filled = is_placeholder if is_empty is None else is_placeholder & ~is_empty
        is_filled = is_filled[..., None].to(inputs_embeds.device)
        inputs_embeds = inputs_embeds.masked_scatter(is_filled, image_hidden_states)
        return inputs_embeds, image_hidden_states, is_empty

    def _inside_images(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mask of placeholders, and of the image start before them, `[batch, sequence]`: what comes next is given."""
        is_placeholder = torch.eq(input_ids, self.config.image_token_id)
        return is_placeholder | nn.functional.pad(is_placeholder[:, 1:], (0, 1), value=False)

    def encode_images(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, LavitImageFeatures] | None = None,
        num_image_tokens: torch.Tensor | None = None,
        image_log_prior: torch.Tensor | None = None,
    ) -> LavitImageFeatures | None:
        """Brings images into one form, whichever of the three they are passed in.

        Args:
            input_ids: Prompts with the placeholders of the images, `[batch, sequence]`.
            pixel_values: See `forward`.
            image_features: See `forward`.
            mm_encoder_outputs: See `forward`.
            num_image_tokens: See `forward`.
            image_log_prior: See `forward`.

        Returns:
            The output of `get_image_features`, or `None` if there are no images.

        Raises:
            ValueError: If images are passed twice, or without ids that show where they go, or a budget without pixels.
        """
        encoded = (mm_encoder_outputs or {}).get("image")
        given = [images for images in (pixel_values, image_features, encoded) if images is not None]
        if len(given) > 1:
            raise ValueError("Pass images once: as pixel_values, image_features or mm_encoder_outputs.")
        if given and input_ids is None:
            raise ValueError("Images need input_ids: embeddings do not show where the images go.")
        if (num_image_tokens is not None or image_log_prior is not None) and pixel_values is None:
            raise ValueError(
                "num_image_tokens and image_log_prior say how to encode pixel_values; pass them together."
            )
        if not given or encoded is not None:
            return encoded
        if pixel_values is not None:
            return self.get_image_features(
                pixel_values=pixel_values,
                num_image_tokens=num_image_tokens,
                log_prior=image_log_prior,
                return_dict=True,
            )
        assert input_ids is not None and image_features is not None
        lengths = split_image_features(torch.eq(input_ids, self.config.image_token_id), image_features)
        return self.get_image_features(image_features=image_features, num_image_tokens=lengths, return_dict=True)

    @staticmethod
    def _check_free_positions(position_ids: torch.Tensor | None) -> None:
        if position_ids is not None:
            raise ValueError(
                "position_ids cannot be given when images have one placeholder per patch, because which of them "
                "count is known only after encoding. Leave position_ids out, or pass `image_features` and one "
                "placeholder for each of them."
            )

    def check_ids(self, input_ids: torch.Tensor) -> None:
        # On a GPU, to look at the ids would be to wait for them, and the lookup itself complains there.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        lowest, highest = (int(value) for value in input_ids.aminmax())
        if lowest < 0:
            raise ValueError(
                f"input_ids hold {lowest}, but ids are not negative. (-100 is for labels; padding has its own id "
                "and a mask.)"
            )
        last = max(self.config.text_config.vocab_size - 1, self.config.image_token_id)
        if highest > last:
            raise ValueError(
                f"input_ids hold {highest}, but the last id of the vocabulary is {last}. (After adding tokens, call "
                "resize_token_embeddings.)"
            )

    @staticmethod
    def check_no_placeholders(is_placeholder: torch.Tensor) -> None:
        if is_placeholder.is_meta or torch.compiler.is_compiling():
            return
        if is_placeholder.any():
            raise ValueError(
                "The prompt holds image placeholders but no images were given. Pass the pixel_values that the "
                "processor returned beside the ids."
            )


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Applies what some language models do after their head: Cohere and Granite scale, Gemma caps softly."""
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _unpack(hidden: torch.Tensor | None, source: torch.Tensor | None) -> Any:
    """Puts states `[batch, sequence, hidden]` of packed rows back where the ids were given.

    States are `None` in layers that were not asked for (`output_hidden_states=[0, -1]`).
    """
    return hidden if hidden is None or source is None else gather_positions(hidden, source)


class LavitForConditionalGeneration(LavitPreTrainedModel, LavitGenerationMixin):
    r"""LaVIT with a language modeling head over text and visual ids.

    Example:

    ```python
    >>> from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

    >>> model = LavitForConditionalGeneration.from_pretrained("path/to/lavit")
    >>> processor = ImageTextProcessor.from_pretrained("path/to/lavit")
    >>> inputs = processor(images=image, text="<image>Question: what is it? Answer:", return_tensors="pt")
    >>> output = model.generate(**inputs, max_new_tokens=10)
    >>> processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```
    """

    output_modalities = ("text", "image")  # type: ignore[assignment]  # declared as a single one
    model: LavitModel
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        self.model = LavitModel(config)
        embeddings: Any = self.get_input_embeddings()
        # As wide as the embeddings: some decoders (OPT-350m) are wider inside.
        self.lm_head = nn.Linear(embeddings.weight.shape[-1], config.text_config.vocab_size, bias=config.lm_head_bias)
        # Not every decoder calls its embeddings as Llama does.
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        # The parts name layers of their whole families; accelerate's FSDP refuses names of layers that are not there.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = present.intersection(self._no_split_modules)  # type: ignore[assignment]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | os.PathLike | None = None,
        text_model_name_or_path: str | os.PathLike | None = None,
        *,
        visual_tokenizer: str | os.PathLike | PreTrainedModel | None = None,
        mean_resizing: bool = True,
        **kwargs: Any,
    ) -> "LavitForConditionalGeneration":
        """A new LaVIT out of a vision encoder, or better a trained visual tokenizer, and a language model.

        The language model's vocabulary is extended by image start, image end, one row per code and one for the
        placeholder of continuous images. Text stays as it was: the new model's logits of text are the language model's
        own.

        Args:
            vision_model_name_or_path: Directory or Hub id of any plain vision transformer, or of a model that has one
                (CLIP, SigLIP, BLIP-2, ...). Selector, merger and codebook around it are new.
            text_model_name_or_path: Directory or Hub id of any decoder of transformers (`AutoModelForCausalLM`).
            visual_tokenizer: Instead of a vision encoder: a trained [`LavitVisualTokenizer`], a model that has one, or
                the directory or Hub id of either. If it has one branch only, the continuous one starts as a copy.
            mean_resizing: Whether the new rows of embeddings and head start at the mean of the others, see
                [`PreTrainedModel.resize_token_embeddings`], or from the language model's own initialization.
            kwargs: Those that start with `vision_` and `text_` go to the `from_pretrained` of either part
                (`text_dtype`, `vision_revision`, ...); `vision_model` and `text_model` are models to use instead,
                which are taken over, not copied. `dtype` (by default the language model's) and `attn_implementation`
                are for the whole model. All others are for [`LavitConfig.from_vision_text_configs`], such as
                `codebook_size`.

        Raises:
            ImportError: If this is remote code: the package composes models.
            TypeError: If an argument is unknown or no model.
            ValueError: If the models cannot become a LaVIT.
        """
        return import_composition().compose_model(
            cls, vision_model_name_or_path, text_model_name_or_path, visual_tokenizer, mean_resizing, **kwargs
        )

    @property
    def visual_tokenizer(self) -> LavitVisualTokenizer:
        return self.model.visual_tokenizer

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, *args: Any, **kwargs: Any) -> LavitImageFeatures:
        """See [`LavitModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs have position_ids, too
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        vocab_slice: tuple[int, int] | None = None,
        mm_encoder_outputs: dict[str, LavitImageFeatures] | None = None,
        num_image_tokens: torch.Tensor | None = None,
        image_log_prior: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitCausalLMOutputWithPast:
        """Predicts the next ids. Arguments not listed here are those of [`LavitModel`].

        Args:
            labels: Ids to predict, `[batch, sequence]`, unshifted; -100, image placeholders and what follows them are
                ignored.
            use_cache: Whether to return a cache; by default what the configuration says (`Trainer` says no), and if it
                says nothing, what the language model's says.
            logits_to_keep: Compute only the last so many logits (0: all), or those at the given positions.
            vocab_slice: Compute logits of ids `[first, last)` only, which saves most of the head when drawing.

        Returns:
            [`LavitCausalLMOutputWithPast`].
        """
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=find_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            num_image_tokens=num_image_tokens,
            image_log_prior=image_log_prior,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._compute_logits(outputs.last_hidden_state[:, kept], vocab_slice)
        logits = scale_logits(logits, self.config.text_config)
        loss = None
        if labels is not None:
            if vocab_slice is not None:
                raise ValueError("labels need the logits of all ids; leave vocab_slice out.")
            learned = labels.masked_fill(torch.eq(labels, self.config.image_token_id), -100)
            learned = self._ignore_image_ends(learned, input_ids)
            learned = self._ignore_after_padding(learned, attention_mask)
            if kwargs.get("num_items_in_batch") is not None and not torch.compiler.is_compiling():
                self._warn_of_ignored(labels, learned)
            labels = learned
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LavitCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            attention_mask=outputs.attention_mask,
            **name_cache(getattr(outputs, CACHE_NAME)),
        )

    def _compute_logits(self, hidden: torch.Tensor, vocab_slice: tuple[int, int] | None) -> torch.Tensor:
        if vocab_slice is None:
            return self.lm_head(hidden)
        # Only a plain head has rows to pick: quantized, adapted or offloaded ones compute all logits.
        is_plain = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) is nn.Parameter
        if is_plain and not hasattr(self.lm_head, "_hf_hook"):
            bias = None if self.lm_head.bias is None else self.lm_head.bias[slice(*vocab_slice)]
            return nn.functional.linear(hidden, self.lm_head.weight[slice(*vocab_slice)], bias)
        return self.lm_head(hidden)[..., slice(*vocab_slice)]

    @staticmethod
    def _warn_of_ignored(labels: torch.Tensor, learned: torch.Tensor) -> None:
        if not torch.equal(labels, learned):
            logger.warning_once(
                "The labels hold image placeholders, ends of continuous images, or first tokens after padding. They "
                "are ignored, but whoever counted num_items_in_batch (as Trainer does) took them for tokens to learn, "
                "which makes the loss too small. Set them to -100, as LavitDataCollator does."
            )

    def _ignore_image_ends(self, labels: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """The end of a continuous image follows from its length: nothing predicts it."""
        if input_ids is None:
            return labels
        is_after = nn.functional.pad(torch.eq(input_ids, self.config.image_token_id)[:, :-1], (1, 0), value=False)
        return labels.masked_fill(is_after, -100)

    @staticmethod
    def _ignore_after_padding(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The first token after padding on the left has nothing real before it that could predict it."""
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return labels
        before = attention_mask[:, -labels.shape[1] : -1]
        return labels.masked_fill(nn.functional.pad(before == 0, (labels.shape[1] - before.shape[1], 0)), -100)


__all__ = [
    "LavitCausalLMOutputWithPast",
    "LavitForConditionalGeneration",
    "LavitImageFeatures",
    "LavitModel",
    "LavitModelOutputWithPast",
    "LavitPreTrainedModel",
]
