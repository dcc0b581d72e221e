"""Visual tokenizer: turns an image into a variable number of tokens (LaVIT paper, section 3.1).

In the order of the data: the vision encoder gives a feature for each patch, the selector keeps some patches, the
merger folds the dropped ones into them, and the quantizer gives each token that is left a code.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .checkpoint_files import load_checkpoint_part
from .configuration_lavit import LavitVisualTokenizerConfig
from .modeling_lavit_merger import LavitMerger

KEEP = 0
"""Index of "keep" in the selector's scores; 1 is "drop"."""

SELECTIONS = ("argmax", "expected", "sample")
"""What may decide which patches are kept; see [`select_patches`]."""

# Copies of one codebook may differ by rounding, if one is stored in half precision.
_ROUNDING = 2**-7


@dataclass
class LavitVisualTokenizerOutput(ModelOutput):
    """Tokens of a batch of images; those of all images follow one another, split by `num_tokens`.

    Args:
        codes: Visual codes, `[total kept]`; `None` in the continuous branch.
        num_tokens: Tokens per image, `[batch]`.
        keep_mask: True where a patch is kept, `[batch, num_patches]`.
        selector_log_probs: Log-probabilities of keeping (index 0) and dropping, `[batch, num_patches, 2]`, fp32.
        features: Merged features of the kept patches, `[total kept, hidden]`.
        pre_quantized: What the codes were looked up with, before l2 normalization, `[total kept, codebook_dim]`;
            `None` in the continuous branch.
        patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.
        hidden_states: States of the vision encoder's layers, if asked for by `output_hidden_states=True`.
        attentions: Attention weights of the vision encoder, if asked for by `output_attentions=True`.
    """

    codes: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    selector_log_probs: torch.Tensor | None = None
    features: torch.Tensor | None = None
    pre_quantized: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def build_vision_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a vision encoder without the final norm of BLIP-2's: LaVIT reads the raw residual stream."""
    if config.model_type != "blip_2_vision_model":
        return AutoModel.from_config(config, **without_pooler(config))
    # Not in the Auto mapping; imported here because it costs a second that `import lavit_hf` should not.
    from transformers import Blip2VisionConfig, Blip2VisionModel

    assert isinstance(config, Blip2VisionConfig)
    model = Blip2VisionModel(config)
    model.set_submodule("post_layernorm", nn.Identity())
    return model


def without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments that build a vision encoder without the pooler of its class token, where it can do without."""
    model_class = MODEL_MAPPING.get(type(config), None)
    has_option = isinstance(model_class, type) and "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if has_option else {}


# Selector: which patches to keep.


class LinearInFp32(nn.Linear):
    """Linear layer that computes in fp32 whatever the dtype of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class LayerNormInFp32(nn.LayerNorm):
    """LayerNorm that computes in fp32 whatever the dtype of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LavitSelector(nn.Module):
    """Predicts for every patch the log-probabilities of keeping and of dropping it.

    Half of the channels stay local to the patch, the other half is replaced by its mean over the image, so that a
    patch is judged against the whole picture. Everything is computed in fp32, whatever the dtype of model and
    autocast, so that everyone keeps the same patches.
    """

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        width = config.hidden_size
        self.norm = LayerNormInFp32(width, eps=config.layer_norm_eps)
        self.in_proj = LinearInFp32(width, width)
        self.out_proj_1 = LinearInFp32(width, width // 2)
        self.out_proj_2 = LinearInFp32(width // 2, width // 4)
        self.out_proj_3 = LinearInFp32(width // 4, 2)
        self.act = nn.GELU()

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.

        Returns:
            Log-probabilities `[batch, num_patches, 2]` in fp32, index 0 is "keep".
        """
        with torch.autocast(patch_features.device.type, enabled=False):
            hidden = self.act(self.in_proj(self.norm(patch_features)))
            local, context = hidden.chunk(2, dim=-1)
            hidden = torch.cat([local, context.mean(dim=1, keepdim=True).expand_as(context)], dim=-1)
            hidden = self.act(self.out_proj_1(hidden))
            hidden = self.act(self.out_proj_2(hidden))
            return self.out_proj_3(hidden).log_softmax(dim=-1)


def select_patches(
    log_probs: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    selection: str | None = None,
    num_tokens: int | Sequence[int] | torch.Tensor | None = None,
    keep_rate: float | None = None,
    log_prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decides which patches to keep.

    With a budget (`num_tokens` or `keep_rate`), and by `"expected"`, those are kept that are likeliest to be; of equal
    ones the first. Of two budgets, the larger one keeps all that the smaller one does, and more.

    Args:
        log_probs: Scores of [`LavitSelector`], `[batch, num_patches, 2]`.
        generator: For `"sample"`: one generator, or one per image.
        selection: What decides without a budget. `"argmax"` keeps a patch where keeping is likelier than dropping;
            `"expected"` as many patches as `"sample"` keeps on average, at least one; `"sample"`, as the original does
            at inference, every patch by chance. By default `"sample"` with a generator, and `"argmax"` without.
        num_tokens: Keeps exactly so many patches, of all images or of each.
        keep_rate: Keeps that share of the patches instead, rounded, at least one.
        log_prior: Added to the log-odds of keeping, `[batch, num_patches]`: log(3) makes keeping three times as
            likely, compared with dropping.

    Returns:
        Boolean mask `[batch, num_patches]`, true where the patch is kept.

    Raises:
        ValueError: If the scores are not finite, arguments contradict each other, or a budget or the number of
            generators does not fit the images.
    """
    if not torch.isfinite(log_probs).all():
        raise ValueError(
            "The selector's scores are not finite: the pixel values contain NaN or infinity, or the weights are "
            "corrupt."
        )
    selection = selection or ("argmax" if generator is None else "sample")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {selection!r}.")
    has_budget = num_tokens is not None or keep_rate is not None
    if (selection == "sample") != (generator is not None) or (generator is not None and has_budget):
        raise ValueError(
            "A generator is for selection='sample', which needs one; a budget (num_tokens, keep_rate) takes the "
            "likeliest patches, and none by chance."
        )
    log_odds = log_probs[..., KEEP] - log_probs[..., 1 - KEEP]
    if log_prior is not None:
        log_odds = log_odds + _check_log_prior(log_prior, log_odds)
    if generator is not None:
        return _uniform(log_odds.shape, generator).to(log_odds.device) < log_odds.sigmoid()
    if has_budget:
        counts = resolve_budget(num_tokens, keep_rate, *log_odds.shape).to(log_odds.device)
    elif selection == "expected":
        counts = log_odds.double().sigmoid().sum(dim=-1).round().long().clamp_min(1)
    else:
        return log_odds > 0
    order = log_odds.argsort(dim=-1, descending=True, stable=True)
    is_first = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(is_first).scatter(1, order, is_first)


def move_pixels(pixel_values: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Images where a visual tokenizer takes them, and as it does; one that is offloaded moves them by itself.

    Args:
        pixel_values: `[images, channels, height, width]`.
        model: The visual tokenizer.
    """
    # What is offloaded is on the meta device between calls.
    return pixel_values.to(device=None if model.device.type == "meta" else model.device, dtype=model.dtype)


def resolve_budget(
    num_tokens: int | Sequence[int] | torch.Tensor | None, keep_rate: float | None, batch_size: int, num_patches: int
) -> torch.Tensor:
    """How many tokens each image gets.

    Args:
        num_tokens: Of all images, or of each.
        keep_rate: The share of patches instead.
        batch_size: Number of images.
        num_patches: Patches of an image.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If not exactly one of both is given, or an image cannot get so many.
    """
    if (num_tokens is None) == (keep_rate is None):
        raise ValueError("Give either num_tokens or keep_rate.")
    if keep_rate is not None:
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate must be more than 0 and at most 1; got {keep_rate}.")
        num_tokens = max(round(keep_rate * num_patches), 1)
    counts = torch.as_tensor(num_tokens)
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.ndim > 1:
        raise ValueError(f"num_tokens must be an integer, or one for each image; got {num_tokens!r}.")
    if counts.ndim == 1 and len(counts) != batch_size:
        raise ValueError(f"Got {len(counts)} numbers of tokens for {batch_size} images.")
    counts = counts.expand(batch_size).long()
    if ((counts < 1) | (counts > num_patches)).any():
        raise ValueError(f"An image has 1 to {num_patches} tokens, as it has {num_patches} patches; got {num_tokens}.")
    return counts


def _check_log_prior(log_prior: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
    if log_prior.shape != log_odds.shape or not torch.isfinite(log_prior).all():
        raise ValueError(
            f"log_prior must be finite, of shape {list(log_odds.shape)} (images, patches); got the shape "
            f"{list(log_prior.shape)}."
        )
    return log_prior.to(log_odds)


def _uniform(shape: torch.Size, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"Got {len(generator)} generators for {shape[0]} images; pass one, or one per image.")
    return torch.stack([torch.rand(shape[1:], generator=one, device=one.device).cpu() for one in generator])


# Quantizer: from tokens to codes.


class LavitQuantizer(nn.Module):
    """Projects tokens to the codebook's width and picks the nearest row.

    Tokens are l2-normalized, codebook rows are taken as stored.
    """

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.proj_in = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.codebook_dim)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: Merged tokens, `[tokens, hidden]`.

        Returns:
            Codes `[tokens]`, and what they were looked up with, `[tokens, codebook_dim]`, before normalization.
        """
        pre_quantized = self.project(features)
        return self.lookup(pre_quantized), pre_quantized

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """What codes are looked up with: `[tokens, hidden]` -> `[tokens, codebook_dim]`."""
        return self.proj_out(self.proj_in(features).tanh())

    def lookup(self, pre_quantized: torch.Tensor) -> torch.Tensor:
        """Nearest codebook row of every token, by squared distance in fp32: `[tokens, codebook_dim]` -> `[tokens]`."""
        with torch.autocast(pre_quantized.device.type, enabled=False):
            tokens = F.normalize(pre_quantized.float(), dim=-1)
            # Called, not read: an offloaded codebook is loaded by its forward hook.
            codebook = self.codebook(torch.arange(self.codebook.num_embeddings, device=tokens.device)).float()
            # |t|^2 is the same for every row, so it cannot change which one is nearest.
            return (codebook.square().sum(dim=-1) - 2 * tokens @ codebook.T).argmin(dim=-1)


def same_codebooks(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether codes mean the same by two codebooks, `[codebook_size, codebook_dim]` each, whatever their dtypes."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.detach().float().cpu(), other.detach().float().cpu(), rtol=_ROUNDING, atol=_ROUNDING)


class LavitBranch(nn.Module):
    """Selector and merger that were trained together, and the quantizer of the discrete branch."""

    def __init__(self, config: LavitVisualTokenizerConfig, has_quantizer: bool):
        super().__init__()
        self.selector = LavitSelector(config)
        self.merger = LavitMerger(config)
        self.quantizer = LavitQuantizer(config) if has_quantizer else None


class LavitVisualTokenizer(PreTrainedModel):
    r"""Encodes images as a variable number of tokens: discrete codes, or continuous features.

    One vision encoder serves two branches. The discrete one ([`~LavitVisualTokenizer.encode`]) gives the codes that a
    language model reads and writes. The continuous one ([`~LavitVisualTokenizer.embed`]) gives features for
    understanding; in the published checkpoints its selector and merger were tuned together with the language model.

    Example:

    ```python
    >>> from lavit_hf import LavitVisualTokenizer

    >>> visual_tokenizer = LavitVisualTokenizer.from_pretrained("path/to/lavit")  # a whole LaVIT, or a tokenizer alone
    >>> output = visual_tokenizer.encode(pixel_values)
    >>> codes_per_image = output.codes.split(output.num_tokens.tolist())
    ```
    """

    config: LavitVisualTokenizerConfig
    config_class = LavitVisualTokenizerConfig
    base_model_prefix = "visual_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2EncoderLayer", "LavitSelector", "LavitMergerLayer", "LavitQuantizer"]
    # Rounding them changes which patches are kept and which codes are nearest.
    _keep_in_fp32_modules_strict = ["selector", "codebook"]
    # Whoever quantizes a model skips what is named here: by a regular expression, as some ask for modules and some for
    # parameters.
    _keep_in_fp32_modules = [".*selector"]

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__(config)
        self.vision_model = build_vision_model(config.vision_config)
        self.discrete = LavitBranch(config, has_quantizer=True)
        self.continuous = None if config.share_branches else LavitBranch(config, has_quantizer=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LavitQuantizer):
            # Tokens are looked up on the unit sphere, so the rows start there.
            init.normal_(module.codebook.weight, std=self.config.codebook_dim**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LavitVisualTokenizerOutput | tuple:
        """Same as [`~LavitVisualTokenizer.encode`]."""
        output = self.encode(pixel_values, generator=generator, keep_mask=keep_mask, **kwargs)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def encode(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_mask: torch.Tensor | None = None,
        selection: str | None = None,
        num_tokens: int | Sequence[int] | torch.Tensor | None = None,
        keep_rate: float | None = None,
        log_prior: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        """Encodes images as discrete codes.

        With a budget, the patches that a smaller one keeps are among those of a larger one, but their codes may be
        others: the merger folds other patches into them.

        Args:
            pixel_values: Preprocessed images, `[batch, channels, height, width]`.
            generator: Samples which patches to keep (as the original does), from one generator or one per image. By
                default an image always becomes the same tokens.
            keep_mask: Boolean `[batch, num_patches]` that overrides the selector.
            selection: Which patches are kept, see [`select_patches`]; by default what the configuration says.
            num_tokens: Budget: exactly so many tokens, of all images or of each.
            keep_rate: Budget: that share of the patches.
            log_prior: Added to the selector's log-odds, `[batch, num_patches]`, to spend more tokens somewhere.
            kwargs: For the vision encoder, such as `output_hidden_states`.

        Returns:
            [`LavitVisualTokenizerOutput`] with all fields.

        Raises:
            ValueError: If sizes do not fit the configuration, or pixel values are not finite.
        """
        choice = self._choice(generator, keep_mask, selection, num_tokens, keep_rate, log_prior)
        output = self._tokenize(self.discrete, pixel_values, choice, **kwargs)
        assert self.discrete.quantizer is not None
        output.codes, output.pre_quantized = self.discrete.quantizer(output.features)
        return output

    def embed(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_mask: torch.Tensor | None = None,
        selection: str | None = None,
        num_tokens: int | Sequence[int] | torch.Tensor | None = None,
        keep_rate: float | None = None,
        log_prior: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        """Encodes images as continuous features; arguments as for [`~LavitVisualTokenizer.encode`].

        Returns:
            [`LavitVisualTokenizerOutput`] without `codes` and `pre_quantized`.
        """
        branch = self.discrete if self.continuous is None else self.continuous
        choice = self._choice(generator, keep_mask, selection, num_tokens, keep_rate, log_prior)
        return self._tokenize(branch, pixel_values, choice, **kwargs)

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the vision encoder without class or register tokens, `[batch, num_patches, hidden]`."""
        return self._patch_features(self._run_vision_model(pixel_values))

    def _patch_features(self, outputs: BaseModelOutput) -> torch.Tensor:
        num_patches, hidden = self.config.num_patches, outputs.last_hidden_state
        assert hidden is not None
        if hidden.ndim != 3 or hidden.shape[1] < num_patches:
            raise ValueError(
                f"The vision model {type(self.vision_model).__name__} gives features of shape {list(hidden.shape)}, "
                f"but LaVIT needs one for each of the {num_patches} patches. Use a plain ViT."
            )
        return hidden[:, -num_patches:]

    def _run_vision_model(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        expected = self.config.image_size
        if pixel_values.ndim != 4 or len(pixel_values) == 0 or tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values must be [batch, channels, {expected[0]}, {expected[1]}], got "
                f"{list(pixel_values.shape)}. Preprocess images with the checkpoint's own image processor."
            )
        return self.vision_model(pixel_values=pixel_values.to(self.dtype), **{**kwargs, "return_dict": True})

    def _choice(
        self,
        generator: torch.Generator | list[torch.Generator] | None,
        keep_mask: torch.Tensor | None,
        selection: str | None,
        num_tokens: int | Sequence[int] | torch.Tensor | None,
        keep_rate: float | None,
        log_prior: torch.Tensor | None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes a mask `[batch, num_patches]` of scores: the policy, or the mask that was given."""
        if keep_mask is None:
            default = self.config.selection if generator is None else "sample"
            return partial(
                select_patches,
                generator=generator,
                selection=selection or default,
                num_tokens=num_tokens,
                keep_rate=keep_rate,
                log_prior=log_prior,
            )
        policy = {
            "selection": selection,
            "num_tokens": num_tokens,
            "keep_rate": keep_rate,
            "log_prior": log_prior,
            "generator": generator,
        }
        if given := [name for name, value in policy.items() if value is not None]:
            raise ValueError(f"keep_mask says which patches are kept already; leave {', '.join(given)} out.")
        return partial(self._check_keep_mask, keep_mask)

    def _tokenize(
        self,
        branch: LavitBranch,
        pixel_values: torch.Tensor,
        choose: Callable[[torch.Tensor], torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        if pixel_values.is_meta:
            raise ValueError(
                "pixel_values hold no values (they are on the device meta), which decide how many tokens there are."
            )
        outputs = self._run_vision_model(pixel_values, **kwargs)
        patch_features = self._patch_features(outputs)
        log_probs = branch.selector(patch_features)
        keep_mask = choose(log_probs)
        return LavitVisualTokenizerOutput(
            num_tokens=keep_mask.sum(dim=-1),
            keep_mask=keep_mask,
            selector_log_probs=log_probs,
            features=branch.merger(patch_features, keep_mask),
            patch_features=patch_features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def _check_keep_mask(keep_mask: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        if keep_mask.dtype != torch.bool or keep_mask.shape != log_probs.shape[:2]:
            raise ValueError(
                f"keep_mask must be boolean of shape {list(log_probs.shape[:2])} (images, patches), got "
                f"{keep_mask.dtype} of shape {list(keep_mask.shape)}."
            )
        return keep_mask.to(log_probs.device)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads a visual tokenizer from its own checkpoint, or its part of a whole LaVIT's.

        Of a sharded checkpoint only the shards that hold the visual tokenizer are read (or downloaded). Arguments are
        those of [`PreTrainedModel.from_pretrained`].

        Raises:
            OSError: If the checkpoint, its safetensors weights, or one of the shards needed is missing.
            ValueError: If a tensor of the visual tokenizer is missing in the checkpoint.
        """
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return load_checkpoint_part(cls, super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)


__all__ = ["LavitVisualTokenizer", "LavitVisualTokenizerOutput", "select_patches"]
