"""Stage 1: training a visual tokenizer together with its token decoder (LaVIT paper, section 3.1)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from ..utils.distributed import sum_over_processes, world_size
from .checkpoint_files import CheckedLoadingMixin
from .codebook import LavitCodebookLearner
from .configuration_lavit_pretraining import LavitPreTrainingConfig
from .merger import padded_positions
from .modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .pretraining_metrics import TokenizerMetrics, perplexity
from .pretraining_output import LavitVisualTokenizerForPreTrainingOutput
from .selector import select_patches
from .selector_learner import LavitSelectorLearner, keep_rate_loss


class LavitVisualTokenizerForPreTraining(CheckedLoadingMixin, PreTrainedModel):
    r"""Trains selector, merger, quantizer and token decoder to reconstruct the features of a frozen vision encoder.

    Both parts can be saved alone (`model.visual_tokenizer.save_pretrained(...)`, likewise `model.token_decoder`), and
    be loaded from a checkpoint of the whole. Training goes through these phases, see [`LavitPreTrainingConfig`]:

    1. `"bypass"`: kept patches go to the token decoder as they are, while the selector learns what is worth keeping;
    2. `"continuous"`: the merger comes in; by default the selector has learned enough and stays as it is;
    3. `"collecting"` (tokens for k-means), then `"quantized"`.

    Noise belongs to the image (`sample_seeds`). In evaluation mode the argmax decides, and nothing is updated.

    Data parallelism is that of `DistributedDataParallel`, with `find_unused_parameters=True` because not every phase
    trains every part: codebook statistics, calibration and the kept share are those of all processes. Sharded
    parameters (FSDP, DeepSpeed ZeRO-3) are not supported; the trained part is small.

    Example:

    ```python
    >>> from lavit_hf.modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining

    >>> model = LavitVisualTokenizerForPreTraining.from_vision_pretrained("openai/clip-vit-large-patch14")
    >>> loss = model(pixel_values, sample_seeds=torch.arange(len(pixel_values))).loss
    ```
    """

    config: LavitPreTrainingConfig
    config_class = LavitPreTrainingConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [*LavitVisualTokenizer._no_split_modules, *LavitTokenDecoder._no_split_modules]
    _keep_in_fp32_modules_strict = [
        *LavitVisualTokenizer._keep_in_fp32_modules_strict,
        *("counts", "sums", "samples", "threshold", "mean_features"),
    ]

    def __init__(self, config: LavitPreTrainingConfig):
        super().__init__(config)
        self.visual_tokenizer = LavitVisualTokenizer(config.visual_tokenizer_config)
        self.token_decoder = LavitTokenDecoder(config.token_decoder_config)
        self.selector_learner = LavitSelectorLearner(config)
        # No name that begins with "codebook": transformers would turn its integers into floats with the codebook.
        self.quantizer_learner = LavitCodebookLearner(config)
        tokenizer = config.visual_tokenizer_config
        self.step: torch.Tensor  # forwards in training mode so far
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.mean_features: torch.Tensor | None
        mean_features = torch.zeros(tokenizer.num_patches, tokenizer.hidden_size)
        self.register_buffer("mean_features", mean_features if config.center_targets else None)
        codebook_size = tokenizer.codebook_size
        self.train_metrics, self.eval_metrics = TokenizerMetrics(codebook_size), TokenizerMetrics(codebook_size)
        self.post_init()
        self._choose_trainable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (LavitCodebookLearner, LavitSelectorLearner, LavitVisualTokenizerForPreTraining)):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        if isinstance(module, LavitVisualTokenizerForPreTraining) and self.config.zero_init_merger:
            module._zero_init_merger()

    def _zero_init_merger(self) -> None:
        for projection in self.visual_tokenizer.discrete.merger.output_projections():
            init.zeros_(projection.weight)
            init.zeros_(projection.bias)

    def _choose_trainable(self) -> None:
        """Frozen are the vision encoder, the codebook (it follows averages), and what stages 2 and 3 train."""
        self.requires_grad_(False)
        branch, decoder = self.visual_tokenizer.discrete, self.token_decoder
        assert branch.quantizer is not None
        for module in (branch.selector, branch.merger, branch.quantizer, decoder):
            module.requires_grad_(True)
        for part in (branch.quantizer.codebook, decoder.codebook, decoder.condition_projections, decoder.pooler):
            if part is not None:
                part.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See [`PreTrainedModel.from_pretrained`]; what is frozen stays so, which transformers leaves to the model."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._choose_trainable()
        return loaded

    @classmethod
    def from_vision_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        vision_model: PreTrainedModel | None = None,
        token_decoder: LavitTokenDecoder | None = None,
        visual_tokenizer_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LavitVisualTokenizerForPreTraining:
        """Builds a new visual tokenizer around a vision encoder, or goes on with a trained one.

        Args:
            pretrained_model_name_or_path: A vision encoder, a model that has one (CLIP, SigLIP, ...), or a trained
                visual tokenizer: directory or Hub id.
            vision_model: Instead of it, a model that is loaded already.
            token_decoder: A trained token decoder of that visual tokenizer; by default a new one.
            visual_tokenizer_config: Fields of the new tokenizer's [`LavitVisualTokenizerConfig`], such as
                `codebook_size`. By default it has `attention_smoothing=0`, and heads and MLPs like the encoder's.
            kwargs: Fields of [`LavitPreTrainingConfig`].

        Raises:
            ValueError: If the encoder gives no features per patch, or parts do not fit together.
        """
        from .pretraining_init import build_pretraining_model

        return build_pretraining_model(
            cls, pretrained_model_name_or_path, vision_model, token_decoder, visual_tokenizer_config or {}, **kwargs
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.visual_tokenizer.get_input_embeddings()

    def train(self, mode: bool = True) -> LavitVisualTokenizerForPreTraining:
        """See `torch.nn.Module.train`; the frozen vision encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.visual_tokenizer.vision_model.eval()
        return self

    @property
    def phase(self) -> str:
        """`"bypass"`, `"continuous"`, `"collecting"` or `"quantized"`."""
        step = int(self.step)
        if self.quantizer_learner.is_initialized:
            return "quantized"
        if step < self.config.bypass_merger_steps:
            return "bypass"
        return "continuous" if step < self.config.quantize_after_steps else "collecting"

    # How many patches are kept differs from batch to batch: compiling the blocks pays, not what lies between them.
    @can_return_tuple
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        sample_seeds: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> LavitVisualTokenizerForPreTrainingOutput:
        """
        Args:
            pixel_values: Preprocessed images, `[batch, channels, height, width]`.
            sample_seeds: Seeds of the images' Gumbel noise, `[batch]`; needed in training mode only.
            return_loss: Tells `Trainer` that evaluation has a loss without labels.

        Returns:
            [`LavitVisualTokenizerForPreTrainingOutput`].

        Raises:
            ValueError: If training lacks seeds, or pixel values have the wrong size or are not finite.
        """
        with torch.no_grad():
            patch_features = self.visual_tokenizer.get_patch_features(pixel_values)
        log_probs, keep = self.selector_learner(
            self.visual_tokenizer.discrete.selector, patch_features, sample_seeds, int(self.step)
        )
        is_kept = keep > 0
        num_tokens = is_kept.sum(dim=-1)
        tokens = self._merge(patch_features, keep, is_kept)
        embeddings, codes, commitment_loss = self._quantize(tokens)
        # Kept patches have weight 1; its gradient is how much a patch that is kept helps.
        embeddings = (embeddings * keep[is_kept][:, None]).to(self.token_decoder.proj_in.weight.dtype)
        sequence, bias = torch.compiler.disable(self.token_decoder.embed)(embeddings, num_tokens.tolist())
        features = self.token_decoder.decode(sequence, bias)
        losses = {
            "reconstruction_loss": self._reconstruction_loss(features, patch_features),
            "keep_rate_loss": keep_rate_loss(keep, self.config),
            "commitment_loss": commitment_loss,
        }
        cosine = F.cosine_similarity(features.detach().float(), patch_features.float(), dim=-1)
        metrics = self.train_metrics if self.training else self.eval_metrics
        metrics.update(losses, cosine, is_kept, log_probs, codes)
        if self.training:
            self.step += 1
        rate = is_kept.float().mean(dim=-1)
        return LavitVisualTokenizerForPreTrainingOutput(
            loss=losses["reconstruction_loss"]
            + self.config.keep_rate_weight * losses["keep_rate_loss"]
            + self.config.commitment_weight * commitment_loss,
            **losses,
            cosine=cosine.mean(),
            keep_rate=rate.mean(),
            keep_rate_spread=rate.std(correction=0),
            argmax_keep_rate=select_patches(log_probs.detach()).float().mean(),
            live_codes=None if codes is None else torch.tensor(len(codes.unique()), device=codes.device),
            perplexity=None if codes is None else perplexity(torch.bincount(codes)),
            codes=codes,
            num_tokens=num_tokens,
            keep_mask=is_kept,
            selector_log_probs=log_probs,
            features=features,
            patch_features=patch_features,
        )

    @torch.compiler.disable(recursive=False)
    def _merge(self, patch_features: torch.Tensor, keep: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
        """Tokens of the kept patches, `[total kept, hidden]`."""
        merger = self.visual_tokenizer.discrete.merger
        if self.step < self.config.bypass_merger_steps:
            # What a merger at its start (output projections at zero) gives.
            return merger.norm(patch_features[is_kept])
        if not keep.requires_grad:
            return merger(patch_features, is_kept)
        positions, is_valid = padded_positions(is_kept)
        return merger.forward_all(patch_features, keep, positions)[is_valid]

    @torch.compiler.disable(recursive=False)
    def _quantize(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the token decoder gets for merged tokens.

        Returns:
            Codebook rows with the gradient of the tokens (without quantization the normalized tokens themselves),
            `[total, codebook_dim]`; codes `[total]` or `None`; the commitment loss.
        """
        quantizer, learner = self.visual_tokenizer.discrete.quantizer, self.quantizer_learner
        assert quantizer is not None
        pre_quantized = quantizer.proj_out(quantizer.proj_in(tokens).tanh())
        normalized = F.normalize(pre_quantized.float(), dim=-1)
        codebook = quantizer.codebook.weight
        if self.training and not learner.is_initialized and self.step >= self.config.quantize_after_steps:
            learner.start(codebook, normalized)
            self._share_codebook()
        if not learner.is_initialized:
            return normalized, None, normalized.new_zeros(())
        codes = torch.compiler.disable(quantizer.lookup)(pre_quantized)
        rows = quantizer.codebook(codes)
        distance = (normalized - rows).square().sum()
        # Processes differ in their number of tokens, and gradients are averaged over processes.
        num_tokens = sum_over_processes(distance.new_tensor(len(codes))) / world_size()
        if self.training:
            learner.update(codebook, normalized, codes)
            self._share_codebook()
        return rows + (normalized - normalized.detach()), codes, distance / num_tokens.clamp_min(1)

    @torch.compiler.disable
    @torch.no_grad()
    def _share_codebook(self) -> None:
        # A copy and no tied weight: each part is complete when it is saved or loaded alone.
        quantizer = self.visual_tokenizer.discrete.quantizer
        assert quantizer is not None
        self.token_decoder.codebook.weight.copy_(quantizer.codebook.weight)

    @torch.compiler.disable(recursive=False)
    def _reconstruction_loss(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        features, targets = features.float(), targets.float()
        if self.mean_features is not None:
            if self.training:
                self._follow_mean(targets)
            features, targets = features - self.mean_features, targets - self.mean_features
        return (1 - F.cosine_similarity(features, targets, dim=-1)).mean()

    @torch.compiler.disable
    @torch.no_grad()
    def _follow_mean(self, targets: torch.Tensor) -> None:
        assert self.mean_features is not None
        count = sum_over_processes(targets.new_tensor(len(targets)))
        mean = sum_over_processes(targets.sum(dim=0)) / count
        self.mean_features.lerp_(mean, 1.0 if self.step == 0 else 1 - self.config.ema_decay)


__all__ = ["LavitVisualTokenizerForPreTraining", "LavitVisualTokenizerForPreTrainingOutput"]
