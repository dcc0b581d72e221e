"""Stage 1: training a visual tokenizer together with its token decoder (LaVIT paper, section 3.1)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ..utils.distributed import gather_rows, sum_over_processes, take_from_first_process, world_size
from .checkpoint_files import CheckedLoadingMixin
from .codebook_learner import LavitCodebookLearner
from .configuration_lavit import LavitPreTrainingConfig
from .modeling_lavit_merger import padded_positions
from .modeling_lavit_token_decoder import LavitTokenDecoder
from .modeling_lavit_visual_tokenizer import KEEP, LavitSelector, LavitVisualTokenizer, select_patches
from .remote_code_mixin import import_composition


@dataclass
class LavitVisualTokenizerForPreTrainingOutput(ModelOutput):
    """What stage 1 makes of a batch of images; tokens of all images follow one another, split by `num_tokens`.

    Args:
        loss: The terms that follow, weighted by the configuration.
        reconstruction_loss: Mean of 1 - cosine between the reconstruction and the features of all patches, of the
            images or of their targets.
        keep_rate_loss: Squared distance of the share that the selector keeps by itself from the wanted one.
        commitment_loss: Mean squared distance between tokens and their codes; 0 without quantization.
        cosine: Mean cosine similarity of the reconstruction and what it should be, never centered.
        keep_rate: Mean share of kept patches.
        keep_rate_spread: Its standard deviation over the images.
        argmax_keep_rate: What inference would keep.
        live_codes: Different codes in the batch; `None` without quantization, as the next.
        perplexity: Of the codes of the batch.
        codes: Visual codes, `[total kept]`; `None` without quantization.
        num_tokens: Tokens per image, `[batch]`.
        keep_mask: True where a patch was kept, `[batch, num_patches]`.
        selector_log_probs: Log-probabilities of keeping (index 0) and dropping, `[batch, num_patches, 2]`.
        features: The reconstruction, `[batch, num_patches, hidden]`.
        patch_features: Features of the images from the vision encoder, `[batch, num_patches, hidden]`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    keep_rate_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    cosine: torch.Tensor | None = None
    keep_rate: torch.Tensor | None = None
    keep_rate_spread: torch.Tensor | None = None
    argmax_keep_rate: torch.Tensor | None = None
    live_codes: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    selector_log_probs: torch.Tensor | None = None
    features: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None


# The selector learns by straight-through Gumbel-softmax decisions (LaVIT paper, section 3.1).


@torch.compiler.disable
def draw_noise(sample_seeds: torch.Tensor, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that is a function of every image's own seed: neither batch, process nor global generator matter.

    Drawn on the CPU, so that it is the same on every device.

    Args:
        sample_seeds: Seed of every image, integers `[batch]`.
        num_patches: Patches per image.

    Returns:
        Standard Gumbel noise `[batch, num_patches, 2]`, and for each image a number from [0, 1) that decides on its
        budget, `[batch]`; in fp32, on the device of `sample_seeds`.
    """
    generator = torch.Generator()
    noise = torch.empty(len(sample_seeds), num_patches, 2)
    uniform = torch.empty(len(sample_seeds))
    for row, number, seed in zip(noise, uniform, sample_seeds.tolist(), strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
        number.uniform_(generator=generator)
    # As in `F.gumbel_softmax`: the negative logarithm of an exponential variable.
    return -noise.log().to(sample_seeds.device), uniform.to(sample_seeds.device)


def straight_through_keep(
    log_probs: torch.Tensor, noise: torch.Tensor | None, temperature: float, num_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Decides which patches to keep, with a gradient.

    Args:
        log_probs: Scores of [`LavitSelector`], `[batch, num_patches, 2]`.
        noise: Gumbel noise of [`draw_noise`]; without it the likelier decision is taken, as in inference.
        temperature: Of the softmax whose gradient is used.
        num_tokens: Budget of each image, `[batch]`: so many of its patches, those with the highest noisy log-odds.

    Returns:
        `[batch, num_patches]`, exactly 1 where a patch is kept and exactly 0 where not; its gradient is that of the
        softmax, and with a budget, as if keeping had been made as much likelier or less likely as the budget asks for.
    """
    scores = log_probs if noise is None else log_probs + noise
    is_kept = select_patches(scores.detach(), num_tokens=num_tokens).to(scores.dtype)
    if num_tokens is not None:
        log_odds = (scores[..., KEEP] - scores[..., 1 - KEEP]).detach().sort(descending=True).values
        # Between the last patch that is kept and the first one that is not.
        edge = torch.stack([num_tokens - 1, num_tokens.clamp_max(log_odds.shape[1] - 1)], dim=-1)
        threshold = log_odds.gather(1, edge).mean(dim=-1)
        scores = torch.stack([scores[..., KEEP] - threshold[:, None], scores[..., 1 - KEEP]], dim=-1)
    soft = (scores / temperature).softmax(dim=-1)[..., KEEP]
    return is_kept + (soft - soft.detach())  # the bracket is exactly 0; in another order it would round


def _draw_noise(sample_seeds: torch.Tensor | None, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if sample_seeds is None or sample_seeds.shape != log_probs.shape[:1]:
        raise ValueError(
            "Training needs sample_seeds, one integer for each image, which VisualTokenizerDataCollator makes; got "
            f"{None if sample_seeds is None else list(sample_seeds.shape)} for {len(log_probs)} images."
        )
    noise, uniform = draw_noise(sample_seeds, log_probs.shape[1])
    return noise.to(log_probs.device), uniform.to(log_probs.device)


class LavitSelectorLearner(nn.Module):
    """Takes the decisions of training, and follows what calibration needs.

    Under Gumbel noise a selector that gives every patch the probability rho meets the wanted rate, while its argmax
    keeps nothing. So the noise ends when the selector has learned: `threshold` is measured for some more steps, and
    then subtracted from its bias, after which the argmax keeps the wanted share, those patches that it likes best.

    With `keep_rate_range` every image has a budget besides: it becomes so many tokens, whatever the selector would
    keep by itself, which is still held to the wanted share.
    """

    threshold: torch.Tensor

    def __init__(self, config: LavitPreTrainingConfig):
        super().__init__()
        self.config = config
        self.register_buffer("threshold", torch.zeros(()))  # log-odds that the wanted share of patches exceeds

    @torch.compiler.disable(recursive=False)
    def forward(
        self, selector: LavitSelector, patch_features: torch.Tensor, sample_seeds: torch.Tensor | None, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            selector: Scores the patches; its bias is shifted once, when it has learned.
            patch_features: Features of the vision encoder, `[batch, num_patches, hidden]`.
            sample_seeds: Seeds of the images' noise, `[batch]`.
            step: Forwards in training mode so far.

        Returns:
            Log-probabilities `[batch, num_patches, 2]`; 1 where a patch is kept, else 0, with a gradient,
            `[batch, num_patches]`; and the same as the selector decides by itself, without a budget.

        Raises:
            ValueError: If training lacks seeds, or features are not finite.
        """
        learned, calibrated = self._schedule()
        if self.training and step == calibrated > learned:
            self._shift(selector)
        if step < learned:
            log_probs = selector(patch_features)
        else:
            with torch.no_grad():
                log_probs = selector(patch_features)
        select_patches(log_probs.detach())  # complains about NaN
        noise = num_tokens = None
        rates, temperature = self.config.keep_rate_range, self.config.gumbel_temperature
        if self.training and (step < calibrated or rates is not None):
            noise, uniform = _draw_noise(sample_seeds, log_probs)
            if rates is not None:
                share = rates[0] + (rates[1] - rates[0]) * uniform
                num_tokens = (share * log_probs.shape[1]).round().long().clamp_min(1)
        if step >= calibrated:
            noise = None
        elif self.training and step >= learned:
            self._measure(log_probs, step - learned)
        own = straight_through_keep(log_probs, noise, temperature)
        if num_tokens is None:
            return log_probs, own, own
        return log_probs, straight_through_keep(log_probs, noise, temperature, num_tokens), own

    def _schedule(self) -> tuple[float, float]:
        """Steps at which the selector stops learning, and from which on the argmax decides."""
        steps = self.config.selector_steps
        if steps is None:
            return math.inf, math.inf
        return steps, steps + (self.config.calibration_steps if steps > 0 else 0)

    @torch.compiler.disable
    @torch.no_grad()
    def _measure(self, log_probs: torch.Tensor, num_measured: float) -> None:
        """Averages the threshold over steps, each of them over the batches of all processes."""
        log_odds = gather_rows((log_probs[..., KEEP] - log_probs[..., 1 - KEEP]).reshape(-1, 1)).flatten()
        rank = min(max(round((1 - self.config.keep_rate) * len(log_odds)), 1), len(log_odds))
        self.threshold.lerp_(log_odds.kthvalue(rank).values, 1 / (num_measured + 1))

    @torch.compiler.disable
    @torch.no_grad()
    def _shift(self, selector: LavitSelector) -> None:
        take_from_first_process(self.threshold)
        selector.out_proj_3.bias[KEEP] -= self.threshold


def keep_rate_loss(keep: torch.Tensor, config: LavitPreTrainingConfig) -> torch.Tensor:
    """Squared distance of the kept share from the wanted one.

    Args:
        keep: 1 where a patch is kept, else 0, with a gradient, `[batch, num_patches]`.
        config: The wanted share, and whether it is that of every image or of all of them, those of other processes
            included.
    """
    rate = keep.mean(dim=-1)
    if config.keep_rate_per_image:
        return (config.keep_rate - rate).square().mean()
    mean = rate.mean()
    # Of all processes, with this one's share of the gradient: gradients are averaged afterwards.
    mean = sum_over_processes(mean) / world_size() + (mean - mean.detach())
    return (config.keep_rate - mean).square()


# Numbers to watch.


class TokenizerMetrics:
    """Sums over batches; what becomes of them is only computed when asked for.

    Args:
        codebook_size: Number of visual codes.
    """

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self._sums: dict[str, torch.Tensor] = {}
        self._uses: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return not self._sums

    @torch.compiler.disable
    @torch.no_grad()
    def update(
        self,
        losses: dict[str, torch.Tensor],
        cosine: torch.Tensor,
        is_kept: torch.Tensor,
        log_probs: torch.Tensor,
        codes: torch.Tensor | None,
    ) -> None:
        """Adds a batch.

        Args:
            losses: Terms of the loss by name, each a mean over images.
            cosine: Similarity of features and their reconstruction, `[batch, num_patches]`.
            is_kept: The decision that was taken, `[batch, num_patches]`.
            log_probs: The selector's scores, `[batch, num_patches, 2]`.
            codes: Codes of all tokens, `[total]`, if there are any.
        """
        rate = is_kept.double().mean(dim=-1)
        probability = log_probs[..., KEEP].double().exp()
        argmax = (log_probs[..., KEEP] > log_probs[..., 1 - KEEP]).double().mean(dim=-1)
        self._add("images", torch.ones_like(rate).sum())
        for name, loss in losses.items():
            self._add(name, loss.double() * len(rate))
        self._add("cosine", cosine.double().mean(dim=-1).sum())
        for name, values in (("keep_rate", rate), ("argmax_keep_rate", argmax)):
            self._add(name, values.sum())
            self._add(f"{name}_squared", values.square().sum())
        self._add("empty", (argmax == 0).double().sum())
        self._add("probability", probability.mean(dim=-1).sum())
        self._add("probability_squared", probability.square().mean(dim=-1).sum())
        if codes is not None:
            uses = torch.bincount(codes, minlength=self.codebook_size)
            self._uses = uses if self._uses is None else self._uses + uses

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def compute(self) -> dict[str, float]:
        """Means over the images of all processes, each of which has to call this.

        Returns:
            The terms of the loss; `cosine`; `keep_rate` and `keep_rate_spread` (standard deviation over images) as
            decided; `argmax_keep_rate`, `argmax_keep_rate_spread` and `argmax_empty_images` (share of images without a
            token) as inference would decide; `keep_probability_spread` (over patches: near zero the selector tells
            nothing apart); with codes also `live_codes`, `used_tokens` and `perplexity`.
        """
        names = list(self._sums)
        totals = sum_over_processes(torch.stack([self._sums[name] for name in names])).tolist()
        sums = dict(zip(names, totals, strict=True))
        images = sums.pop("images")
        means = {name: value / images for name, value in sums.items()}
        metrics = {name: value for name, value in means.items() if name.endswith("_loss")}
        metrics["cosine"] = means["cosine"]
        for name in ("keep_rate", "argmax_keep_rate"):
            metrics[name] = means[name]
            metrics[f"{name}_spread"] = _deviation(means[name], means[f"{name}_squared"])
        metrics["argmax_empty_images"] = means["empty"]
        metrics["keep_probability_spread"] = _deviation(means["probability"], means["probability_squared"])
        if self._uses is not None:
            uses = sum_over_processes(self._uses)
            metrics["live_codes"] = int((uses > 0).sum())
            metrics["used_tokens"] = int(uses.sum())
            metrics["perplexity"] = float(perplexity(uses))
        return metrics


def perplexity(uses: torch.Tensor) -> torch.Tensor:
    """How many equally common codes would be as hard to guess as codes that were used so often, `[codebook_size]`."""
    share = uses.double() / uses.sum().clamp_min(1)
    return torch.special.entr(share).sum().exp()


def _deviation(mean: float, mean_square: float) -> float:
    return max(mean_square - mean * mean, 0.0) ** 0.5


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
    >>> from lavit_hf import LavitVisualTokenizerForPreTraining

    >>> model = LavitVisualTokenizerForPreTraining.from_vision_pretrained("openai/clip-vit-large-patch14")
    >>> loss = model(pixel_values, sample_seeds=torch.arange(len(pixel_values))).loss
    ```
    """

    config: LavitPreTrainingConfig
    config_class = LavitPreTrainingConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
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
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
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
        return import_composition().compose_pretraining_model(
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
        target_pixel_values: torch.Tensor | None = None,
    ) -> LavitVisualTokenizerForPreTrainingOutput:
        """
        Args:
            pixel_values: Preprocessed images, `[batch, channels, height, width]`.
            sample_seeds: Seeds of the images' noise and budgets, `[batch]`; needed in training mode only.
            return_loss: Tells `Trainer` that evaluation has a loss without labels.
            target_pixel_values: Images whose features are to be reconstructed from tokens of `pixel_values`, in the
                same shape: the same scenes in another style, without noise, in full light. By default the images
                themselves, as in the paper.

        Returns:
            [`LavitVisualTokenizerForPreTrainingOutput`].

        Raises:
            ValueError: If training lacks seeds, if pixel values have the wrong size or are not finite, or if there
                are not as many targets as images.
        """
        with torch.no_grad():
            targets = patch_features = self.visual_tokenizer.get_patch_features(pixel_values)
            if target_pixel_values is not None:
                targets = self.visual_tokenizer.get_patch_features(target_pixel_values)
                if targets.shape != patch_features.shape:
                    raise ValueError(
                        f"Got {len(target_pixel_values)} target images for {len(pixel_values)} images: each needs one."
                    )
        log_probs, keep, own_keep = self.selector_learner(
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
            "reconstruction_loss": self._reconstruction_loss(features, targets),
            "keep_rate_loss": keep_rate_loss(own_keep, self.config),
            "commitment_loss": commitment_loss,
        }
        cosine = F.cosine_similarity(features.detach().float(), targets.float(), dim=-1)
        metrics = self.train_metrics if self.training else self.eval_metrics
        metrics.update(losses, cosine, is_kept, log_probs, codes)
        if self.training:
            self.step += 1
        loss = losses["reconstruction_loss"] + self.config.keep_rate_weight * losses["keep_rate_loss"]
        loss = loss + self.config.commitment_weight * commitment_loss
        if self.training and not loss.requires_grad:
            # A selector that learns alone is calibrated: nothing learns, but trainers go backward all the same.
            loss = loss + loss.new_zeros((), requires_grad=True)
        rate = is_kept.float().mean(dim=-1)
        return LavitVisualTokenizerForPreTrainingOutput(
            loss=loss,
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
        pre_quantized = quantizer.project(tokens)
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
