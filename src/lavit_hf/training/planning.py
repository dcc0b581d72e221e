"""How long a training takes, what memory it needs and what it costs, computed before it is started.

Networks are built without weights (device "meta"). torch counts the products of their forward passes, and their
parameters, with what training keeps beside them, are the memory. The one thing measured is the share of a GPU's peak
that training reaches (`PEAK_SHARE`); `TrainingPlan.assumptions` says what else is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..composition import build_visual_config, find_visual_config
from ..modeling.configuration_lavit import LavitConfig, LavitTokenDecoderConfig, LavitVisualTokenizerConfig
from ..modeling.modeling_lavit import LavitForConditionalGeneration
from ..modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from ..modeling.modeling_lavit_token_decoder import LavitTokenDecoder
from ..modeling.modeling_lavit_visual_tokenizer import LavitVisualTokenizer, build_vision_model
from ..utils.json_files import read_json_object
from .language_model.preparation import freeze_for_language_modeling

STAGES = ("stage1", "stage2", "stage3", "lora")
GIB = 2**30
GPUS_PER_NODE = 8

# Share of the vendor's peak that a training step reaches: LoRA at 7B size, 8 rows of 512 tokens, rank 16, embeddings
# and head whole, checkpointing, 6400 tokens per second on one H200. All stages are planned with it.
PEAK_SHARE = 0.27
# Bytes for each logit while the loss is computed: in bf16, in fp32, its log-softmax and its gradient.
_LOGIT_BYTES = 14
# What CUDA and its libraries take of a GPU before the first tensor, and what the allocator loses to fragments.
_CONTEXT_BYTES = 1.5 * GIB
_FRAGMENTS = 1.05
# 4-bit NormalFloat in blocks of 64 weights, their scales in 8 bits (QLoRA, Dettmers et al., 2023, section 3).
_NF4_BYTES = (4 + 0.127) / 8

# What the recipes of examples/lavit_7b say, for a plan without a recipe.
DEFAULTS: dict[str, dict[str, Any]] = {
    "stage1": {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 1, "gradient_checkpointing": True},
    "stage2": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
    },
    "stage3": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
    },
    "lora": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}
# What else of them changes what is computed. A recipe that leaves these out has the scripts' own values instead.
CHOICES: dict[str, dict[str, Any]] = {
    "stage1": {"bypass_merger_steps": 0.1, "selector_steps": 0.1},
    "lora": {"train_embeddings": False, "image_first_probability": 1.0},
}

# What of a recipe is a number, beside sizes.
_NUMBERS = ("keep_rate", "bypass_merger_steps", "selector_steps", "image_first_probability", "max_steps")

# The published high-resolution pixel decoder: that of SDXL.
SDXL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_UNET_LAYERS = ("ResnetBlock2D", "Transformer2DModel")  # what diffusers computes again with checkpointing


class Gpu(NamedTuple):
    """A kind of GPU, as its vendor describes it.

    Attributes:
        tflops: Peak of dense bf16 products, 10^12 per second.
        memory: What torch finds there, in bytes.
        link: To the other GPUs of its node, one way, in bytes per second.
    """

    tflops: float
    memory: float
    link: float


GPUS = {
    "a100": Gpu(312, 79 * GIB, 300e9),
    "a100-40gb": Gpu(312, 39 * GIB, 300e9),
    "h100": Gpu(989, 79 * GIB, 450e9),
    "h200": Gpu(989, 139 * GIB, 450e9),
    "l40s": Gpu(362, 44 * GIB, 25e9),
    "rtx4090": Gpu(165, 23.5 * GIB, 25e9),
}
_NODE_LINK = 50e9  # between nodes, for each GPU: one port of 400 Gbit/s


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will take. Times do not count data that come too slowly, evaluations and checkpoints.

    Attributes:
        stage: One of `STAGES`.
        num_gpus: How many GPUs.
        gpu: Their name in `GPUS`.
        is_sharded: Whether each GPU holds a part of the weights (FSDP2), and not a copy.
        num_samples: Pairs or pictures that are trained on.
        batch_size: Samples of an update.
        tokens_per_sample: Positions of the language model, or tokens of the picture.
        tflops_per_sample: Products of one sample, forward and backward, with what checkpointing computes again.
        num_parameters: Of all networks, and how many of them learn.
        memory: Bytes of one GPU by what they are for.
        hours: From begin to end.
        price_per_hour: Of one GPU, in dollars.
        assumptions: What was assumed, in sentences.
        warnings: What speaks against this plan, in sentences.
    """

    stage: str
    num_gpus: int
    gpu: str
    is_sharded: bool
    num_samples: int
    batch_size: int
    tokens_per_sample: float
    tflops_per_sample: float
    num_parameters: tuple[int, int]
    memory: dict[str, float]
    hours: float
    price_per_hour: float
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def updates(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus

    @property
    def cost(self) -> float:
        """In dollars."""
        return self.gpu_hours * self.price_per_hour

    @property
    def samples_per_second(self) -> float:
        return self.num_samples / (3600 * self.hours)

    @property
    def tokens_per_second(self) -> float:
        return self.samples_per_second * self.tokens_per_sample

    @property
    def total_memory(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= GPUS[self.gpu].memory


class Work(NamedTuple):
    """What one network does with one sample.

    Attributes:
        flops: Products and sums of its forward pass.
        passes: How often as much is computed: 1 forward, 1 for gradients of inputs, 1 for those of weights, 1 again
            with checkpointing.
        kept: Values that wait for the backward pass.
        kept_by_layers: With checkpointing, values that go into layers and wait for the backward pass.
        largest_layer: With checkpointing, values within the layer that is being computed again.
    """

    flops: float
    passes: float = 1
    kept: float = 0
    kept_by_layers: float = 0
    largest_layer: float = 0

    def activation_bytes(self, checkpointing: bool, width: int) -> float:
        """Bytes for one sample; what goes from layer to layer stays fp32 in mixed precision."""
        if self.passes <= 1:
            return 0
        return 4 * self.kept_by_layers + width * self.largest_layer if checkpointing else width * self.kept


class Networks(NamedTuple):
    """The networks of a stage, without weights.

    Attributes:
        modules: All that a GPU holds.
        works: What they do with one sample.
        tokens: See `TrainingPlan.tokens_per_sample`.
        logits: Values of the language model's head for one sample.
        averages: Whether an average of what learns is held, too.
        layers: Class names of what FSDP gathers at once.
    """

    modules: list[nn.Module]
    works: list[Work]
    tokens: float
    logits: float = 0
    averages: bool = False
    layers: Sequence[str] = ()


def plan_training(
    stage: str,
    num_samples: int | None = None,
    *,
    num_gpus: int = 8,
    gpu: str = "h100",
    recipe: Mapping[str, Any] | None = None,
    vision_config: PreTrainedConfig | None = None,
    text_config: PreTrainedConfig | None = None,
    shard: bool | None = None,
    text_tokens: int = 23,
    peak_share: float = PEAK_SHARE,
    price_per_hour: float = 2.5,
) -> TrainingPlan:
    """Plans the training of a stage.

    Args:
        stage: One of `STAGES`.
        num_samples: Pairs (or pictures) to train on; by default as many as `max_steps` of the recipe take.
        num_gpus: How many GPUs, of nodes of 8.
        gpu: One of `GPUS`.
        recipe: Options of the stage's script, as `--config` has them, of which those are read that change what is
            computed. By default those of the recipes for 7B.
        vision_config: Vision encoder; by default that of the published LaVIT. May be of a model that has one.
        text_config: Language model, without visual ids; by default the published one.
        shard: Whether to shard the weights; by default stage 2 is, on several GPUs.
        text_tokens: Tokens of the text of a pair.
        peak_share: Share of the GPU's peak that is reached.
        price_per_hour: Of one GPU, in dollars.

    Returns:
        The plan.

    Raises:
        ValueError: A value makes no sense, or the stage does not shard.
    """
    values = {**DEFAULTS.get(stage, {}), **(CHOICES.get(stage, {}) if recipe is None else recipe)}
    _check(stage, num_gpus, gpu, shard, text_tokens, peak_share, price_per_hour)
    for name in _NUMBERS:
        if isinstance(values.get(name, 0), bool) or not isinstance(values.get(name, 0), (int, float)):
            raise ValueError(f"{name} has to be a number, got {values[name]!r}.")
    is_sharded = (stage == "stage2" and num_gpus > 1) if shard is None else shard and num_gpus > 1
    networks = _BUILDERS[stage](values, vision_config, text_config, text_tokens)
    per_gpu = _positive(values, "per_device_train_batch_size")
    accumulated = _positive(values, "gradient_accumulation_steps", 1)
    batch_size = per_gpu * accumulated * num_gpus
    if num_samples is None:
        if values.get("max_steps", -1) < 1:
            raise ValueError("How many samples? Neither num_samples nor max_steps of a recipe says so.")
        num_samples = values["max_steps"] * batch_size
    if num_samples < 1:
        raise ValueError(f"num_samples has to be positive, got {num_samples}.")
    flops = sum(work.flops * work.passes for work in networks.works)
    memory = _memory(networks, values, per_gpu, num_gpus, is_sharded)
    compute = flops * per_gpu * accumulated / (GPUS[gpu].tflops * 1e12 * peak_share)
    transfer = _transfer_seconds(networks, num_gpus, gpu, accumulated, is_sharded)
    plan = TrainingPlan(
        stage=stage,
        num_gpus=num_gpus,
        gpu=gpu,
        is_sharded=is_sharded,
        num_samples=num_samples,
        batch_size=batch_size,
        tokens_per_sample=networks.tokens,
        tflops_per_sample=flops / 1e12,
        num_parameters=_count(networks),
        memory=memory,
        hours=math.ceil(num_samples / batch_size) * max(compute, transfer) / 3600,
        price_per_hour=price_per_hour,
    )
    plan.assumptions.extend(_assumptions(plan, peak_share, text_tokens))
    plan.warnings.extend(_warnings(plan, values, compute, transfer))
    return plan


def _check(
    stage: str, num_gpus: int, gpu: str, shard: bool | None, text_tokens: int, peak_share: float, price: float
) -> None:
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is no stage; there are {', '.join(STAGES)}.")
    if gpu not in GPUS:
        raise ValueError(f"{gpu!r} is no GPU that is known here; there are {', '.join(GPUS)}.")
    if shard and stage in ("stage1", "stage3"):
        raise ValueError(f"{stage} does not shard: every GPU holds a copy of what learns.")
    if num_gpus < 1 or text_tokens < 0 or price < 0:
        raise ValueError("Numbers of GPUs are positive; tokens and prices are not negative.")
    if not 0 < peak_share <= 1:
        raise ValueError(f"peak_share is a share of the peak, above 0 and up to 1; got {peak_share}.")


def _positive(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} has to be a positive whole number, got {value!r}.")
    return value


# The networks of each stage.


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), init.no_init_weights():
        yield


def _stage1(values: Mapping[str, Any], vision_config: Any, text_config: Any, text_tokens: int) -> Networks:
    vision = find_visual_config(vision_config or LavitVisualTokenizerConfig())
    vision = vision.vision_config if isinstance(vision, LavitVisualTokenizerConfig) else vision
    with _on_meta():
        model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
            vision_model=build_vision_model(vision),
            visual_tokenizer_config={
                "codebook_size": values.get("codebook_size", 16384),
                "codebook_dim": values.get("codebook_dim", 32),
                "merger_num_layers": values.get("num_layers", 12),
            },
            token_decoder_config={
                "cross_attention_dims": values.get("cross_attention_dims", [768, 1280]),
                "pooled_size": values.get("pooled_size", 1280) or None,
            },
        )
        tokenizer, decoder = model.visual_tokenizer, model.token_decoder
        patches = tokenizer.config.num_patches
        kept = _num_kept(patches, values)
        steps = values.get("max_steps", -1)
        bypass, selector_steps = values.get("bypass_merger_steps", 0.2), values.get("selector_steps", 0.2)
        bypassed = _share(bypass, steps)
        learns_to_the_end = selector_steps < 0
        passes = 4 if _checkpoints(values) else 3
        merger = _merger_work(tokenizer, kept, is_dense=learns_to_the_end)
        works = [
            _encoder_work(tokenizer),
            _selector_work(tokenizer)._replace(
                passes=3 if learns_to_the_end else 1 + 2 * _share(selector_steps, steps)
            ),
            merger._replace(passes=passes * (1 - bypassed)),
            _trace(lambda: decoder.decode(*decoder.embed(torch.empty(kept, decoder.config.codebook_dim), [kept])))
            ._replace(passes=passes),
        ]  # fmt: skip
    return Networks([model], works, kept)


def _stage2(values: Mapping[str, Any], vision_config: Any, text_config: Any, text_tokens: int) -> Networks:
    model = _language_model(vision_config, text_config)
    freeze_for_language_modeling(model)
    return _read_and_drawn(model, model, values, text_tokens, merger_learns=True)


def _lora(values: Mapping[str, Any], vision_config: Any, text_config: Any, text_tokens: int) -> Networks:
    from peft import get_peft_model

    from .language_model.adapters import get_lora_config, upcast_trained_weights

    model = _language_model(vision_config, text_config).to(torch.bfloat16)  # type: ignore[arg-type]
    whole = {} if values.get("train_embeddings", True) else {"modules_to_save": None}
    config = get_lora_config(model, r=_positive(values, "lora_r", 16), **whole)
    with torch.device("meta"):
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        upcast_trained_weights(adapted)
    return _read_and_drawn(adapted, model, values, text_tokens, merger_learns=False)


def _language_model(vision_config: Any, text_config: Any) -> LavitForConditionalGeneration:
    if vision_config is None and text_config is None:
        config = LavitConfig()
    else:
        config = LavitConfig.from_vision_text_configs(
            vision_config or LavitVisualTokenizerConfig().vision_config,
            text_config or AutoConfig.for_model("llama", rms_norm_eps=1e-5),
        )
    with _on_meta():
        return LavitForConditionalGeneration(config)


def _read_and_drawn(
    whole: nn.Module, model: Any, values: Mapping[str, Any], text_tokens: int, merger_learns: bool
) -> Networks:
    """A pair is read or drawn; either way its picture is encoded, by the branch that is needed."""
    tokenizer = model.visual_tokenizer
    kept = _num_kept(tokenizer.config.num_patches, values)
    tokens = kept + 2 + text_tokens  # with image start and end
    checkpointing = _checkpoints(values)
    read = values.get("image_first_probability", 0.5)
    head = model.get_output_embeddings().weight
    with _on_meta():
        merger = _merger_work(tokenizer, kept, is_dense=tokenizer.config.attention_smoothing > 0)
        works = [
            _encoder_work(tokenizer),
            merger._replace(passes=1 + read * (2 + checkpointing) * merger_learns),
            *language_model_works(model, tokens, checkpointing),
        ]
    layers = [*model._no_split_modules, *getattr(model.model.language_model, "_no_split_modules", ())]
    return Networks([whole], works, tokens, logits=tokens * head.shape[0], layers=layers)


def language_model_works(model: Any, tokens: int, checkpointing: bool) -> list[Work]:
    """What the decoder and its head do with one row of so many tokens.

    Args:
        model: The model, or what was adapted, in which adapters are; their weights tell what learns.
        tokens: Length of the row.
        checkpointing: Whether layers are computed again.
    """
    decoder, head = model.model.language_model, model.get_output_embeddings()
    width = model.config.text_config.hidden_size
    dtype = next(decoder.parameters()).dtype
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)  # of four dimensions, which is taken as it is
    rows = torch.empty(1, tokens, width, dtype=dtype)
    traced = _trace(lambda: decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False))
    linears = [part.weight for part in decoder.modules() if isinstance(part, nn.Linear)]
    learned = sum(2 * tokens * weight.numel() for weight in linears if weight.requires_grad)
    gradients = learned / traced.flops  # share of the products whose weights learn
    head_learns = any(value.requires_grad for value in head.parameters())
    head_flops = 2 * tokens * head.weight.numel()
    return [
        traced._replace(passes=2 + gradients + checkpointing),
        Work(head_flops, passes=2 + head_learns),
    ]


def _stage3(values: Mapping[str, Any], vision_config: Any, text_config: Any, text_tokens: int) -> Networks:
    from diffusers import AutoencoderKL

    from .pixel_decoder.pixel_decoder import build_pixel_decoder, condition_widths, select_trained_parameters

    vision = find_visual_config(vision_config or LavitVisualTokenizerConfig())
    if not isinstance(vision, LavitVisualTokenizerConfig):
        vision = build_visual_config(vision)
    vision.share_branches = True  # one branch: codes
    path = values.get("unet_config")
    unet_config = SDXL_UNET if path is None else read_json_object(path, ValueError)
    width, patches = vision.hidden_size, vision.num_patches
    decoder_config = LavitTokenDecoderConfig(
        hidden_size=width,
        output_size=width,
        num_heads=vision.merger_num_heads,
        intermediate_size=vision.merger_intermediate_size,
        num_queries=patches,
        codebook_size=vision.codebook_size,
        codebook_dim=vision.codebook_dim,
    )
    with _on_meta():
        tokenizer = LavitVisualTokenizer(vision).requires_grad_(False)
        pipeline = build_pixel_decoder(
            LavitTokenDecoder(decoder_config), AutoencoderKL.from_config(SDXL_VAE), unet_config
        )
        select_trained_parameters(pipeline, bool(values.get("train_token_decoder", False)))
        unet, vae, decoder = pipeline.unet, pipeline.vae, pipeline.token_decoder
        condition_width, pooled = condition_widths(unet.config)
        height, wide = (values.get(name) or 8 * unet.config.sample_size for name in ("height", "width"))
        kept = _num_kept(patches, values)
        condition = torch.empty(1, patches, condition_width)
        latents = torch.empty(1, unet.config.in_channels, height // 8, wide // 8)
        added = None if pooled is None else {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        works = [
            _trace(lambda: unet(latents, 500, condition, added_cond_kwargs=added))._replace(
                passes=3 + _checkpoints(values)
            ),
            _trace(lambda: vae.encode(torch.empty(1, 3, height, wide)).latent_dist.mean),
            _trace(lambda: decoder(torch.zeros(kept, dtype=torch.long), [kept]))._replace(
                passes=3 if values.get("train_token_decoder") else 1
            ),
            _encoder_work(tokenizer),
            _merger_work(tokenizer, kept, is_dense=vision.attention_smoothing > 0),
        ]
    return Networks([unet, vae, decoder, tokenizer], works, kept, averages=bool(values.get("use_ema", True)))


_BUILDERS: dict[str, Callable[..., Networks]] = {
    "stage1": _stage1,
    "stage2": _stage2,
    "stage3": _stage3,
    "lora": _lora,
}


def _num_kept(patches: int, values: Mapping[str, Any]) -> int:
    return max(1, round(patches * values.get("keep_rate", 1 / 3)))


def _share(steps: float, all_steps: int) -> float:
    """Steps as a share of all, which they are already if they are below 1."""
    return steps if steps < 1 else min(1.0, steps / all_steps) if all_steps > 0 else 0.0


def _checkpoints(values: Mapping[str, Any]) -> bool:
    return bool(values.get("activation_checkpointing") or values.get("gradient_checkpointing"))


def _encoder_work(tokenizer: LavitVisualTokenizer) -> Work:
    pixels = torch.empty(1, 3, *tokenizer.config.image_size, dtype=tokenizer.dtype)
    return _trace(lambda: tokenizer.get_patch_features(pixels))


def _merger_work(tokenizer: LavitVisualTokenizer, kept: int, is_dense: bool) -> Work:
    """A merger computes all patches, or kept ones alone if its attention is exact and the choice has no gradient."""
    merger, width, patches = tokenizer.discrete.merger, tokenizer.config.hidden_size, tokenizer.config.num_patches
    layer: Any = merger.layers[0]
    rows, sources = (patches, patches) if is_dense else (kept, patches - kept)
    pairs = 2 * width**2  # keys and values of cross-attention, which are of the sources
    products = rows * (_linear_weights(layer) - pairs) + sources * pairs + 2 * rows * (rows + sources) * width
    values = rows * (9 * width + 2 * layer.mlp.fc1.out_features) + sources * 2 * width
    depth = len(merger.layers)
    return Work(2 * depth * products, kept=depth * values, kept_by_layers=depth * rows * width, largest_layer=values)


def _selector_work(tokenizer: LavitVisualTokenizer) -> Work:
    selector, patches = tokenizer.discrete.selector, tokenizer.config.num_patches
    return Work(2 * patches * _linear_weights(selector), kept=4 * patches * tokenizer.config.hidden_size)


def _linear_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _trace(function: Callable[[], Any]) -> Work:
    """Runs something without weights, and counts its products and the values that a backward pass would need.

    These are what goes into and comes out of modules that hold no others. Kernels that fuse attention keep no more.
    """
    seen: dict[int, torch.Tensor] = {}  # by identity; they are held, so that none takes another's place
    inner: list[int] = []
    layers: list[tuple[int, int]] = []

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in _UNET_LAYERS

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_layer(module):
            inner.append(sum(value.numel() for value in seen.values()))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if next(module.children(), None) is None:
            for value in (*inputs, output):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    seen.setdefault(id(value), value)
        elif is_layer(module):
            first = next((value.numel() for value in inputs if isinstance(value, torch.Tensor)), 0)
            layers.append((first, sum(value.numel() for value in seen.values()) - inner.pop()))

    handles = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            function()
    finally:
        for handle in handles:
            handle.remove()
    return Work(
        counter.get_total_flops(),
        kept=sum(value.numel() for value in seen.values()),
        kept_by_layers=sum(first for first, _ in layers),
        largest_layer=max((size for _, size in layers), default=0),
    )


# Memory and time.


def _parameters(networks: Networks) -> dict[str, nn.Parameter]:
    return {
        f"{index}.{name}": value
        for index, module in enumerate(networks.modules)
        for name, value in module.named_parameters()
    }


def _count(networks: Networks) -> tuple[int, int]:
    sizes = [(value.numel(), value.requires_grad) for value in _parameters(networks).values()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def _memory(
    networks: Networks, values: Mapping[str, Any], per_gpu: int, num_gpus: int, is_sharded: bool
) -> dict[str, float]:
    """Bytes of one GPU."""
    quantized = _quantized(networks) if values.get("load_in_4bit") else set()
    is_bf16 = bool(values.get("bf16", True))
    width = 2 if is_bf16 else 4
    weights = gradients = states = averages = copies = buckets = 0.0
    state_bytes = 2 if "8bit" in str(values.get("optim", "")) else 8  # two moments
    for name, value in _parameters(networks).items():
        # Under FSDP selectors and codebook stay whole.
        parts = num_gpus if is_sharded and not any(part in name for part in ("selector", "quantizer")) else 1
        size = value.numel() / parts
        weights += size * (_NF4_BYTES if name in quantized else value.element_size())
        if value.requires_grad:
            gradients += 4 * size
            states += state_bytes * size
            averages += 4 * size * networks.averages
            buckets += 4 * size * (num_gpus > 1 and not is_sharded)
            copies += 2 * size * (is_bf16 and not is_sharded and value.element_size() == 4)  # autocast keeps them
    buffers = sum(value.numel() * value.element_size() for part in networks.modules for value in part.buffers())
    activations = per_gpu * sum(work.activation_bytes(_checkpoints(values), width) for work in networks.works)
    memory = {
        "weights": weights + buffers,
        "gradients": gradients,
        "optimizer": states,
        "average": averages,
        "copies in bf16": copies + (_gathered(networks) if is_sharded else 0),
        "buckets of gradients": buckets,
        "activations": activations,
        "logits": per_gpu * networks.logits * _LOGIT_BYTES,
        "CUDA": _CONTEXT_BYTES,
    }
    memory["fragments"] = (_FRAGMENTS - 1) * sum(memory.values())
    return {name: value for name, value in memory.items() if value}


def _quantized(networks: Networks) -> set[str]:
    """Weights that `--load_in_4bit` quantizes: frozen linear layers of the language model but for its head."""
    found = set()
    for index, module in enumerate(networks.modules):
        for name, part in module.named_modules():
            is_kept = any(word in name for word in ("visual_tokenizer", "multi_modal_projector", "lm_head", "lora_"))
            if isinstance(part, nn.Linear) and not is_kept and not part.weight.requires_grad:
                found.add(f"{index}.{name}.weight")
    return found


def _gathered(networks: Networks) -> float:
    """What FSDP holds whole for a while, in bf16: all outside of layers, and two layers at a time."""
    within, largest = 0, 0
    total = _count(networks)[0]
    for module in networks.modules:
        for part in module.modules():
            if type(part).__name__ in networks.layers:
                size = sum(value.numel() for value in part.parameters())
                within, largest = within + size, max(largest, size)
    return 2.0 * (total - within + 2 * largest)


def _transfer_seconds(networks: Networks, num_gpus: int, gpu: str, accumulated: int, is_sharded: bool) -> float:
    """Of an update: gradients are summed once, or weights gathered twice and gradients scattered at every batch."""
    if num_gpus == 1:
        return 0.0
    link = GPUS[gpu].link if num_gpus <= GPUS_PER_NODE else min(GPUS[gpu].link, _NODE_LINK)
    total, learned = _count(networks)
    share = (num_gpus - 1) / num_gpus
    sent = accumulated * (2 * 2 * total + 4 * learned) if is_sharded else 2 * 4 * learned
    return share * sent / link


def _assumptions(plan: TrainingPlan, peak_share: float, text_tokens: int) -> list[str]:
    gpu = GPUS[plan.gpu]
    is_measured = peak_share == PEAK_SHARE
    found = [
        f"Products run at {peak_share:.0%} of {gpu.tflops:.0f} TFLOP/s, "
        + ("as measured with LoRA at 7B on one H200; no other stage and no other GPU was measured." if is_measured
           else "as you say."),
        "Data arrive in time; evaluations, checkpoints and failures are not counted.",
        f"A GPU costs ${plan.price_per_hour:.2f} an hour.",
    ]  # fmt: skip
    if plan.stage in ("stage2", "lora"):
        found.insert(1, f"A text has {text_tokens} tokens; pictures are encoded on the way, not tokenized before.")
    if plan.num_gpus > 1:
        found.append("Computing hides what GPUs send each other, unless that takes longer; several were not measured.")
    return found


def _warnings(plan: TrainingPlan, values: Mapping[str, Any], compute: float, transfer: float) -> list[str]:
    found = []
    capacity = GPUS[plan.gpu].memory
    if not plan.fits:
        remedies = []
        if plan.stage in ("stage2", "lora") and not plan.is_sharded:
            remedies.append("shard (--shard, on several GPUs)")
        if not _checkpoints(values):
            remedies.append("set gradient_checkpointing: true")
        if plan.memory.get("activations", 0) + plan.memory.get("logits", 0) > plan.total_memory / 5:
            remedies.append("take a smaller per_device_train_batch_size")
        remedies.append("take more or larger GPUs")
        found.append(
            f"It does not fit: {plan.total_memory / GIB:.0f} GiB are needed, a {plan.gpu} has {capacity / GIB:.0f}. "
            f"What helps: {'; '.join(remedies)}."
        )
    elif plan.total_memory > 0.9 * capacity:
        found.append(f"It is tight: {plan.total_memory / GIB:.0f} of {capacity / GIB:.0f} GiB, by an estimate.")
    if transfer > compute:
        found.append(
            f"GPUs wait for each other: an update sends for {transfer:.1f} s and computes for {compute:.1f} s. Larger "
            "batches per GPU help."
        )
    if values.get("load_in_4bit"):
        found.append("Weights in 4 bits are unpacked at every use, which takes time that was not measured.")
    if plan.stage == "stage1" and plan.updates < 10_000:
        found.append(f"{plan.updates} updates are few: the authors trained the tokenizer for 50,000.")
    return found
