"""Configuration of stage 1, the training of a visual tokenizer."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_lavit import LavitTokenDecoderConfig, LavitVisualTokenizerConfig
from .file_errors import NamedConfigMixin


@strict
class LavitPreTrainingConfig(NamedConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`LavitVisualTokenizerForPreTraining`].

    Args:
        visual_tokenizer_config: The visual tokenizer to train. For a new one set `attention_smoothing=0`.
        token_decoder_config: The token decoder that learns with it. Whatever it leaves out is as in the tokenizer:
            sizes, and as many blocks, heads and MLP channels as the merger has.
        keep_rate: Share of patches that should be kept (rho).
        keep_rate_weight: Weight of `(keep_rate - kept share)^2` (lambda).
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


def _sizes(tokenizer: LavitVisualTokenizerConfig) -> dict[str, int]:
    """What a token decoder must share with the visual tokenizer whose codes it decodes."""
    return {
        "codebook_size": tokenizer.codebook_size,
        "codebook_dim": tokenizer.codebook_dim,
        "num_queries": tokenizer.num_patches,
        "output_size": tokenizer.hidden_size,
    }


def _decoder_like(tokenizer: LavitVisualTokenizerConfig) -> dict[str, Any]:
    return {
        **_sizes(tokenizer),
        "hidden_size": tokenizer.hidden_size,
        "num_layers": tokenizer.merger_num_layers,
        "num_heads": tokenizer.merger_num_heads,
        "intermediate_size": tokenizer.merger_intermediate_size,
        "hidden_act": tokenizer.hidden_act,
    }


__all__ = ["LavitPreTrainingConfig"]
