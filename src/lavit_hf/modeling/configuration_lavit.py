"""Configurations of the LaVIT models (Jin et al., ICLR 2024, https://arxiv.org/abs/2309.04669)."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checkpoint_files import NamedConfigMixin
from .remote_code_mixin import RemoteCodeDictMixin, import_composition

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


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
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
            With `0` attention is an exact masked softmax, and no new states of dropped patches are computed, which is
            faster.
        codebook_size: Number of visual codes.
        codebook_dim: Width of a codebook row.
        selection: Which patches are kept where a call does not say: `"argmax"`, those that the selector would rather
            keep than drop, or `"expected"`, as many of the likeliest as the original, which samples, keeps on average.
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
    selection: str = "argmax"
    share_branches: bool = False
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks that the sizes fit together."""
        _check_positive(self, "merger_intermediate_size", "codebook_size", "codebook_dim")
        sizes = (*self.image_size, *as_pair(self.vision_config.patch_size))
        if min(sizes) < 1 or self.num_patches < 1:
            raise ValueError(
                f"vision_config: images of {self.vision_config.image_size} pixels have no patches of "
                f"{self.vision_config.patch_size}."
            )
        _check_heads(self.hidden_size, self.merger_num_heads, "merger_num_heads")
        if self.selection not in ("argmax", "expected"):
            raise ValueError(
                f"selection must be 'argmax' or 'expected', got {self.selection!r}. (To sample, pass a generator.)"
            )
        if self.attention_smoothing < 0:
            raise ValueError(f"attention_smoothing must be 0 or positive, got {self.attention_smoothing}.")

    @property
    def hidden_size(self) -> int:
        """Width of the visual features."""
        return self.vision_config.hidden_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images the encoder takes, in pixels."""
        return as_pair(self.vision_config.image_size)

    @property
    def num_patches(self) -> int:
        """Patches per image, which is also the largest number of tokens an image can become."""
        (height, width), (patch_height, patch_width) = self.image_size, as_pair(self.vision_config.patch_size)
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
            the last code. It has no row if it is `vocab_size`, outside of embeddings and head, as in models of this
            package's first versions; trainers that compute the loss from the head by themselves, such as TRL's, do not
            work with these.
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
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "attention_mask"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 48386, "rms_norm_eps": 1e-5}
        ),
        "visual_tokenizer_config": SubConfigSpec(config_class=LavitVisualTokenizerConfig),
    }

    text_config: Any = None
    visual_tokenizer_config: Any = None
    if TYPE_CHECKING:  # `None` is what `__post_init__` replaces
        boi_token_id: int = 0
        eoi_token_id: int = 0
        visual_token_offset: int = 0
        image_token_id: int = 0
    else:
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
        if self.boi_token_id < 0 or last_code >= vocab_size:
            raise ValueError(
                f"text_config.vocab_size ({vocab_size}) has no room for image start ({self.boi_token_id}), image end "
                f"({self.eoi_token_id}) and {codebook_size} visual codes from {self.visual_token_offset} on. Resize "
                "the language model's embeddings to text vocabulary + 2 + codebook_size."
            )
        text_ids = (getattr(self.text_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        control_ids = {id for ids in text_ids for id in (ids if isinstance(ids, list) else [ids])}
        placeholder = self.image_token_id
        # In models of the first versions it is `vocab_size`, the id after the last row.
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
            ImportError: If this is remote code: the package composes models.
            TypeError: If a keyword argument is unknown.
            ValueError: If the vision encoder gives no features per patch, or the language model is no decoder.
        """
        return cls(**import_composition().join_configs(vision_config, text_config, **kwargs))

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The vision encoder's, under the name that other models give it."""
        return self.visual_tokenizer_config.vision_config

    @property
    def visual_token_ids(self) -> list[int]:
        """Every id that belongs to images: start, end and the codes."""
        end = self.visual_token_offset + self.visual_tokenizer_config.codebook_size
        return list(range(self.boi_token_id, end))  # they follow one another: `validate_architecture`


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
        default_guidance_scale: How much pipelines stress the condition where a call does not say; `None` is as the
            original does.
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
    default_guidance_scale: float | int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks that the sizes fit together."""
        _check_positive(self, "codebook_size", "codebook_dim", "intermediate_size", "num_queries", "output_size")
        _check_heads(self.hidden_size, self.num_heads, "num_heads")
        if self.pooled_size is not None and self.output_size % self.num_heads:
            raise ValueError(
                f"The pooled condition needs output_size ({self.output_size}) to be a multiple of num_heads "
                f"({self.num_heads}); or leave it out: pooled_size=None."
            )
        if not 0 <= self.num_negative_tokens <= self.num_queries:
            raise ValueError(
                f"num_negative_tokens must be between 0 and num_queries ({self.num_queries}), got "
                f"{self.num_negative_tokens}."
            )
        if self.default_guidance_scale is not None and not 0 <= self.default_guidance_scale < float("inf"):
            raise ValueError(
                f"default_guidance_scale must be a finite number from 0 on, got {self.default_guidance_scale}."
            )


@strict
class LavitPreTrainingConfig(NamedConfigMixin, PreTrainedConfig):
    r"""Configuration of stage 1, the training of a visual tokenizer: of a [`LavitVisualTokenizerForPreTraining`].

    Args:
        visual_tokenizer_config: The visual tokenizer to train. For a new one set `attention_smoothing=0`.
        token_decoder_config: The token decoder that learns with it. Whatever it leaves out is as in the tokenizer:
            sizes, and as many blocks, heads and MLP channels as the merger has.
        keep_rate: Share of patches that should be kept (rho).
        keep_rate_weight: Weight of `(keep_rate - kept share)^2` (lambda).
        keep_rate_range: Two rates. In training, every image becomes another share of its patches as tokens, drawn from
            this range, so that one tokenizer serves all budgets; what its selector keeps by itself is held to
            `keep_rate` all the same.
        keep_rate_per_image: Whether every image should keep that share, or (the default) only all of them together.
        gumbel_temperature: Temperature of the softmax that gives the decision to keep its gradient.
        bypass_merger_steps: For that many steps the token decoder sees the kept patches as they are. The merger would
            put the whole picture into whichever patches are kept, and teach the selector little. With 0 the merger is
            on from the start, as the authors describe it.
        selector_steps: For that many steps the selector learns, under Gumbel noise. Then it is calibrated, and learns
            no more: from then on its argmax decides, as in inference. 0 takes a selector as it is; with `None` it
            learns under noise to the end, as the authors describe.
        calibration_steps: Steps after `selector_steps` in which is measured by how much the selector's bias has to be
            shifted for its argmax to keep `keep_rate` of the patches. With 0 the bias is not shifted.
        quantize_after_steps: Steps to train without quantization before tokens become codes; 0 quantizes at once.
        commitment_weight: Weight of the squared distance between tokens and their codes.
        ema_decay: Decay of the codebook's moving averages, per step.
        kmeans_init: Whether the codebook starts from k-means; if not, from what it holds.
        kmeans_tokens_per_code: Tokens that k-means sees, as a multiple of the codebook's size. They are collected over
            as many steps as it takes.
        kmeans_iterations: Rounds of k-means.
        revive_every_steps: Codes that nothing used for that many steps are moved to tokens in need of one; 0 never.
        center_targets: Whether features are compared after the mean feature of their position has been subtracted from
            both. The plain cosine flatters: a constant feature scores well already.
        zero_init_merger: Whether a new merger starts as the identity, its output projections at zero.
        seed: Decides about k-means and revived codes.

    A step is a forward in training mode: with gradient accumulation there are several per update of the weights.

    Example:

    ```python
    >>> from lavit_hf import LavitPreTrainingConfig

    >>> config = LavitPreTrainingConfig(visual_tokenizer_config={"attention_smoothing": 0, "merger_num_layers": 6})
    >>> config.token_decoder_config.num_layers, config.token_decoder_config.num_queries
    (6, 256)
    ```
    """

    model_type = "lavit_visual_tokenizer_pretraining"
    # What differs in size from batch to batch, or is large.
    keys_to_ignore_at_inference = [
        "codes",
        "num_tokens",
        "keep_mask",
        "selector_log_probs",
        "features",
        "patch_features",
    ]
    sub_configs_defaults = {
        "visual_tokenizer_config": SubConfigSpec(config_class=LavitVisualTokenizerConfig),
        "token_decoder_config": SubConfigSpec(config_class=LavitTokenDecoderConfig),
    }

    visual_tokenizer_config: Any = None
    token_decoder_config: Any = None
    keep_rate: float = 1 / 3
    keep_rate_weight: float | int = 2.0
    keep_rate_range: list[float | int] | tuple[float | int, ...] | None = None
    keep_rate_per_image: bool = False
    gumbel_temperature: float | int = 1.0
    bypass_merger_steps: int = 5000
    selector_steps: int | None = 5000
    calibration_steps: int = 20
    quantize_after_steps: int = 15000
    commitment_weight: float | int = 0.1
    ema_decay: float = 0.99
    kmeans_init: bool = True
    kmeans_tokens_per_code: int = 8
    kmeans_iterations: int = 10
    revive_every_steps: int = 20
    center_targets: bool = False
    zero_init_merger: bool = True
    seed: int = 0

    def __post_init__(self, **kwargs):
        if not isinstance(self.visual_tokenizer_config, PreTrainedConfig):
            self.visual_tokenizer_config = LavitVisualTokenizerConfig(**(self.visual_tokenizer_config or {}))
        if not isinstance(self.token_decoder_config, PreTrainedConfig):
            defaults = _decoder_like(self.visual_tokenizer_config)
            self.token_decoder_config = {**defaults, **(self.token_decoder_config or {})}
        if isinstance(self.keep_rate_range, tuple):
            self.keep_rate_range = list(self.keep_rate_range)
        super().__post_init__(**kwargs)

    @property
    def num_kmeans_tokens(self) -> int:
        """Tokens that k-means sees."""
        return self.kmeans_tokens_per_code * self.visual_tokenizer_config.codebook_size if self.kmeans_init else 0

    def validate_architecture(self) -> None:
        """Part of `@strict` validation: checks that the parts fit together and that values make sense."""
        decoder = self.token_decoder_config
        for name, size in _sizes(self.visual_tokenizer_config).items():
            if (value := getattr(decoder, name)) != size:
                raise ValueError(
                    f"token_decoder_config.{name} must be {size} to fit the visual tokenizer, got {value}."
                )
        for name in ("keep_rate", "ema_decay"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        rates = self.keep_rate_range
        if rates is not None and not (len(rates) == 2 and 0 < rates[0] <= rates[1] <= 1):
            raise ValueError(f"keep_rate_range must be two rates in order, above 0 and at most 1; got {rates}.")
        for name in ("gumbel_temperature", "kmeans_tokens_per_code", "kmeans_iterations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in (
            "keep_rate_weight",
            "bypass_merger_steps",
            "calibration_steps",
            "quantize_after_steps",
            "commitment_weight",
            "revive_every_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or positive, got {getattr(self, name)}.")
        if self.selector_steps is not None and self.selector_steps < 0:
            raise ValueError(f"selector_steps must be 0, positive or None, got {self.selector_steps}.")


def _sizes(tokenizer: PreTrainedConfig) -> dict[str, int]:
    """What a token decoder must share with the visual tokenizer whose codes it decodes."""
    return {
        "codebook_size": tokenizer.codebook_size,
        "codebook_dim": tokenizer.codebook_dim,
        "num_queries": tokenizer.num_patches,
        "output_size": tokenizer.hidden_size,
    }


def _decoder_like(tokenizer: PreTrainedConfig) -> dict[str, Any]:
    return {
        **_sizes(tokenizer),
        "hidden_size": tokenizer.hidden_size,
        "num_layers": tokenizer.merger_num_layers,
        "num_heads": tokenizer.merger_num_heads,
        "intermediate_size": tokenizer.merger_intermediate_size,
        "hidden_act": tokenizer.hidden_act,
    }


__all__ = ["LavitConfig", "LavitPreTrainingConfig", "LavitTokenDecoderConfig", "LavitVisualTokenizerConfig"]
