"""Configurations of the LaVIT models (Jin et al., ICLR 2024, https://arxiv.org/abs/2309.04669)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .file_errors import NamedConfigMixin
from .saving import RemoteCodeDictMixin

# EVA-CLIP ViT-g/14 as published: 40 layers, none of them skipped as BLIP-2 does.
_PUBLISHED_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
}


def _check_heads(width: int, num_heads: int, name: str) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{name} must be positive and divide the width {width}, got {num_heads}.")


def _check_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")


def _as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@strict
class LavitVisualTokenizerConfig(NamedConfigMixin, RemoteCodeDictMixin, PreTrainedConfig):
    r"""Configuration of a [`LavitVisualTokenizer`]. The defaults are those of the published 7B checkpoints.

    Args:
        vision_config: The vision encoder, any transformers vision model; EVA-CLIP ViT-g/14 as a
            [`Blip2VisionConfig`] by default.
        merger_num_layers: Blocks of the token merger.
        merger_num_heads: Attention heads of every merger block.
        merger_intermediate_size: Hidden width of the merger's MLPs.
        hidden_act: Activation of the merger's MLPs.
        layer_norm_eps: Epsilon of the LayerNorms of selector and merger.
        attention_smoothing: Epsilon that smooths the merger's attention weights. The published weights need `1e-6`.
            With `0` attention is an exact masked softmax and dropped patches are not computed at all, which is faster.
        codebook_size: Number of visual codes.
        codebook_dim: Width of a codebook row.
        share_branches: Whether the continuous branch (understanding) uses the selector and merger of the discrete
            one. The published checkpoints hold two sets.
        initializer_range: Standard deviation of the weight initialization.

    Example:

    ```python
    >>> from lavit_hf import LavitVisualTokenizer, LavitVisualTokenizerConfig

    >>> config = LavitVisualTokenizerConfig(
    ...     vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    ...                    "num_attention_heads": 2, "image_size": 56},
    ...     merger_num_layers=1, merger_num_heads=2, merger_intermediate_size=64, codebook_size=64, codebook_dim=8,
    ... )
    >>> LavitVisualTokenizer(config).config.num_patches
    16
    ```
    """

    model_type = "lavit_visual_tokenizer"
    base_config_key = "visual_tokenizer_config"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="blip_2_vision_model", init_kwargs=_PUBLISHED_VISION
        )
    }

    vision_config: Any = None
    merger_num_layers: int = 12
    merger_num_heads: int = 16
    merger_intermediate_size: int = 6144
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_smoothing: float | int = 1e-6
    codebook_size: int = 16384
    codebook_dim: int = 32
    share_branches: bool = False
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks that the sizes fit together."""
        _check_positive(self, "merger_intermediate_size", "codebook_size", "codebook_dim")
        sizes = (*self.image_size, *_as_pair(self.vision_config.patch_size))
        if min(sizes) < 1 or self.num_patches < 1:
            raise ValueError(
                f"vision_config: images of {self.vision_config.image_size} pixels have no patches of "
                f"{self.vision_config.patch_size}."
            )
        _check_heads(self.hidden_size, self.merger_num_heads, "merger_num_heads")
        if self.attention_smoothing < 0:
            raise ValueError(f"attention_smoothing must be 0 or positive, got {self.attention_smoothing}.")

    @property
    def hidden_size(self) -> int:
        """Width of the visual features."""
        return self.vision_config.hidden_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images the encoder takes, in pixels."""
        return _as_pair(self.vision_config.image_size)

    @property
    def num_patches(self) -> int:
        """Patches per image, which is also the largest number of tokens an image can become."""
        (height, width), (patch_height, patch_width) = self.image_size, _as_pair(self.vision_config.patch_size)
        return (height // patch_height) * (width // patch_width)


@strict
class LavitConfig(NamedConfigMixin, RemoteCodeDictMixin, PreTrainedConfig):
    r"""Configuration of a [`LavitForConditionalGeneration`]. The defaults are those of the published 7B checkpoints.

    The vocabulary is that of the text tokenizer followed by image start, image end, one row per visual code and, in
    new models, one for the placeholder of continuous images. Published ones have no row to spare: their placeholder is
    Llama's `<unk>`, which no text becomes.

    Args:
        text_config: The language model, any transformers decoder; Llama by default. Its `vocab_size` counts the visual
            ids.
        visual_tokenizer_config: The visual tokenizer.
        boi_token_id: Id of the image start. By default the visual ids are taken to be the last ones of the vocabulary.
        eoi_token_id: Id of the image end.
        visual_token_offset: Id of visual code 0; code `c` has the id `visual_token_offset + c`.
        image_token_id: Id of the placeholder that stands for one continuous feature in `input_ids`: a row of the
            vocabulary that nothing else uses. By default 0 with the default language model, and otherwise the id after
            the last code. That may be `vocab_size`, outside of embeddings and head, as in models of old; trainers that
            compute the loss from the head by themselves, such as TRL's, do not work with these.
        lm_head_bias: Whether the head has a bias, as that of Phi.

    Example:

    ```python
    >>> from lavit_hf import LavitConfig

    >>> config = LavitConfig()
    >>> config.text_config.vocab_size, config.boi_token_id, config.image_token_id
    (48386, 32000, 0)
    ```
    """

    model_type = "lavit"
    # Without a file that says so: TRL asks for the Auto class of models that transformers itself does not have.
    auto_map: ClassVar[dict[str, str]] = {
        "AutoModelForImageTextToText": "modeling_lavit.LavitForConditionalGeneration"
    }
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "attention_mask"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 48386, "rms_norm_eps": 1e-5}
        ),
        "visual_tokenizer_config": SubConfigSpec(config_class=LavitVisualTokenizerConfig),
    }

    text_config: Any = None
    visual_tokenizer_config: Any = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    visual_token_offset: int | None = None
    image_token_id: int | None = None
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        is_published = self.text_config is None
        super().__post_init__(**kwargs)
        codebook_size = self.visual_tokenizer_config.codebook_size
        if self.boi_token_id is None:
            self.boi_token_id = self.text_config.vocab_size - codebook_size - 2
        if self.eoi_token_id is None:
            self.eoi_token_id = self.boi_token_id + 1
        if self.visual_token_offset is None:
            self.visual_token_offset = self.eoi_token_id + 1
        if self.image_token_id is None:
            self.image_token_id = 0 if is_published else self.visual_token_offset + codebook_size
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks the order of the visual ids, and that all of them have rows."""
        ids = (self.boi_token_id, self.eoi_token_id, self.visual_token_offset)
        if ids != (self.boi_token_id, self.boi_token_id + 1, self.boi_token_id + 2):
            raise ValueError(
                "boi_token_id, eoi_token_id and visual_token_offset must follow one another, as image start, image "
                f"end and code 0 do in the vocabulary; got {', '.join(map(str, ids))}."
            )
        codebook_size = self.visual_tokenizer_config.codebook_size
        vocab_size, last_code = self.text_config.vocab_size, self.visual_token_offset + codebook_size - 1
        if self.boi_token_id < 0 or max(self.boi_token_id, self.eoi_token_id, last_code) >= vocab_size:
            raise ValueError(
                f"text_config.vocab_size ({vocab_size}) has no room for image start ({self.boi_token_id}), image end "
                f"({self.eoi_token_id}) and {codebook_size} visual codes from {self.visual_token_offset} on. Resize "
                "the language model's embeddings to text vocabulary + 2 + codebook_size."
            )
        text_ids = (getattr(self.text_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        control_ids = {id for ids in text_ids for id in (ids if isinstance(ids, list) else [ids])}
        placeholder = self.image_token_id
        # The id `vocab_size` is that of models of old, before the placeholder had a row.
        is_row = 0 <= placeholder <= vocab_size
        if not is_row or placeholder in control_ids or placeholder in self.visual_token_ids:
            raise ValueError(
                f"image_token_id ({placeholder}) must be a row of the vocabulary ({vocab_size} rows) that nothing "
                f"else uses: the one after the last code ({last_code + 1}), or one of text that no text becomes, but "
                "neither image start, image end or a code, nor the language model's bos_token_id, eos_token_id or "
                "pad_token_id."
            )

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **kwargs: Any
    ) -> "LavitConfig":
        """The configuration of a new LaVIT around a vision encoder and a language model.

        The visual ids follow the rows of the language model's embedding table, which may be more than its tokenizer
        has ids.

        Args:
            vision_config: That of any plain vision transformer; of a model that has one (CLIP, SigLIP, BLIP-2, ...);
                or of a trained visual tokenizer.
            text_config: That of any decoder. Its `vocab_size` does not count the visual ids yet.
            kwargs: Fields of [`LavitVisualTokenizerConfig`] (such as `codebook_size`) and `tie_word_embeddings`. A new
                visual tokenizer has by default merger heads and MLPs like the encoder's, and `attention_smoothing=0`.

        Raises:
            TypeError: If a keyword argument is unknown.
            ValueError: If the vision encoder gives no features per patch, or the language model is no decoder.
        """
        from .vision_text_configs import join_configs

        return cls(**join_configs(vision_config, text_config, **kwargs))

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The vision encoder's, under the name that other models give it."""
        return self.visual_tokenizer_config.vision_config

    @property
    def visual_token_ids(self) -> list[int]:
        """Every id that belongs to images: start, end and the codes."""
        codes = range(self.visual_token_offset, self.visual_token_offset + self.visual_tokenizer_config.codebook_size)
        return sorted({self.boi_token_id, self.eoi_token_id, *codes})


@strict
class LavitTokenDecoderConfig(NamedConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`LavitTokenDecoder`]. The defaults are those of the published high-resolution decoder.

    Args:
        codebook_size: Number of visual codes.
        codebook_dim: Width of a codebook row.
        hidden_size: Width of the decoder, equal to that of the vision features.
        num_layers: Decoder blocks.
        num_heads: Attention heads of every block.
        intermediate_size: Hidden width of the MLPs.
        num_queries: Learned queries, which is also the number of positions a code sequence can have.
        output_size: Width of the decoded features.
        cross_attention_dims: Widths of the condition heads, concatenated to the U-Net's `cross_attention_dim`:
            `[768, 1280]` for the SDXL decoder, `[768]` for the Stable Diffusion 1.5 one.
        pooled_size: Width of the pooled condition; `None` if the U-Net takes none.
        num_negative_tokens: Rows of the stored negative condition, which stands in for the condition where guidance
            wants none. Zeros fill it up to `num_queries`; with 0 it is all zeros, as in the high-resolution decoder.
        hidden_act: Activation of the MLPs.
        layer_norm_eps: Epsilon of the LayerNorms.
        initializer_range: Standard deviation of the weight initialization.
    """

    model_type = "lavit_token_decoder"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}

    codebook_size: int = 16384
    codebook_dim: int = 32
    hidden_size: int = 1408
    num_layers: int = 12
    num_heads: int = 16
    intermediate_size: int = 6144
    num_queries: int = 256
    output_size: int = 1408
    cross_attention_dims: list[int] | tuple[int, ...] = (768, 1280)
    pooled_size: int | None = 1280
    num_negative_tokens: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks that the sizes fit together."""
        _check_positive(self, "codebook_size", "codebook_dim", "intermediate_size", "num_queries", "output_size")
        _check_heads(self.hidden_size, self.num_heads, "num_heads")
        if not 0 <= self.num_negative_tokens <= self.num_queries:
            raise ValueError(
                f"num_negative_tokens must be between 0 and num_queries ({self.num_queries}), got "
                f"{self.num_negative_tokens}."
            )


__all__ = ["LavitConfig", "LavitTokenDecoderConfig", "LavitVisualTokenizerConfig"]
