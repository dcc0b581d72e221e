"""LaVIT: a language model that reads images as continuous features or as words of its vocabulary.

Made by lavit-hf from its own modules: change it there. License: Apache-2.0.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import torch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, EncoderNoRepeatNGramLogitsProcessor, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, StoppingCriteriaList, initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, TransformersKwargs, can_return_tuple, logging
from transformers.utils.hub import cached_file
from types import TracebackType
from typing import Any
from .configuration_lavit import LavitConfig, LavitVisualTokenizerConfig, _as_pair


_ATTRIBUTE = "_lavit_attention_mask"


def remember_mask(cache: Cache, attention_mask: torch.Tensor) -> None:
    """Stores the mask `[batch, cached positions]` of what `cache` holds."""
    setattr(cache, _ATTRIBUTE, attention_mask.bool())


def forget_mask(cache: Cache | None) -> torch.Tensor | None:
    """Takes the remembered mask out of `cache`."""
    mask = getattr(cache, _ATTRIBUTE, None)
    if mask is not None:
        delattr(cache, _ATTRIBUTE)
    return mask


def apply_remembered_mask(
    attention_mask: torch.Tensor | None, cache: Cache | None, batch_size: int, new_positions: int
) -> torch.Tensor | None:
    """Takes positions that `cache` remembers as empty out of `attention_mask`.

    Args:
        attention_mask: `[batch, past + new]`, all ones if `None`; other than 2D masks are left alone.
        cache: The cache that the call goes on from.
        batch_size: Rows of the call.
        new_positions: Positions that the call adds.

    Returns:
        The mask to use; `attention_mask` itself if nothing is remembered.

    Raises:
        ValueError: If the cache was filled with another number of rows.
    """
    remembered = getattr(cache, _ATTRIBUTE, None)
    is_other_mask = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
    if remembered is None or cache is None or is_other_mask:
        return attention_mask
    if len(remembered) != batch_size:
        raise ValueError(
            f"past_key_values was filled with {len(remembered)} rows, some of whose image placeholders are empty, but "
            f"{batch_size} rows go on from it. Attach the visual tokenizer to the processor to rearrange cached rows."
        )
    if attention_mask is None:
        total = int(cache.get_seq_length()) + new_positions
        attention_mask = torch.ones(batch_size, total, dtype=torch.long, device=remembered.device)
    # The cache may have been cropped, or emptied, since.
    width = min(remembered.shape[1], attention_mask.shape[1] - new_positions)
    past = attention_mask[:, :width] * remembered[:, :width].to(attention_mask.dtype)
    return torch.cat([past, attention_mask[:, width:]], dim=1)


_HUB_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def load_checkpoint_part(
    model_class: type[PreTrainedModel],
    loader: Callable[..., Any],
    checkpoint: str | os.PathLike,
    *model_args: Any,
    **kwargs: Any,
) -> Any:
    """Loads `model_class` from its own checkpoint or from that of a model that contains it.

    Args:
        model_class: Its `base_model_prefix` names the part inside the whole.
        loader: The `from_pretrained` to finish with.
        checkpoint: Directory or Hub id.
        model_args: Passed on to the model.
        kwargs: Those of [`PreTrainedModel.from_pretrained`].

    Returns:
        What `loader` returns.

    Raises:
        OSError: If weights are missing or unreadable.
        ValueError: If the checkpoint lacks a tensor of the part.
    """
    hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
    config = _load_part_config(model_class, checkpoint, hub_kwargs, kwargs)
    state_dict = _read_part(checkpoint, model_class.base_model_prefix, kwargs.pop("variant", None), hub_kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    for name in _HUB_KWARGS:
        kwargs.pop(name, None)
    model, info = loader(None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks these tensors of {model_class.__name__}: {', '.join(sorted(info['missing_keys']))}."
        )
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return (model, info) if wants_info else model


def _load_part_config(
    model_class: type[PreTrainedModel],
    checkpoint: str | os.PathLike,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedConfig:
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config
    config_class = model_class.config_class
    assert config_class is not None
    # As in transformers, keyword arguments that name a configuration value override it.
    known = config_class.__dataclass_fields__.keys() - {"dtype"}
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    return config_class.from_pretrained(config or checkpoint, **hub_kwargs, **overrides)


def _read_part(
    checkpoint: str | os.PathLike, prefix: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    index_file = cached_file(
        checkpoint,
        _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant),
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    if index_file is None:
        files = [_with_variant(SAFE_WEIGHTS_NAME, variant)]
    else:
        with open(index_file, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        inside = _prefix_in(weight_map, prefix)
        files = sorted({shard for name, shard in weight_map.items() if name.startswith(inside)})
    state_dict: dict[str, torch.Tensor] = {}
    for name in files:
        state_dict.update(_read_tensors(cached_file(checkpoint, name, **hub_kwargs), prefix))
    return state_dict


def _read_tensors(path: str, prefix: str) -> dict[str, torch.Tensor]:
    with name_corrupt_weights(path), safe_open(path, framework="pt") as file:
        inside = _prefix_in(file.keys(), prefix)
        names = [name for name in file.keys() if name.startswith(inside)]  # noqa: SIM118 - no dictionary
        return {name[len(inside) :]: file.get_tensor(name) for name in names}


@contextmanager
def name_corrupt_weights(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Turns the bare message of safetensors about an unreadable file into one that says which and what to do.

    Args:
        checkpoint: A file of weights, a directory that holds some, or a Hub id.

    Raises:
        OSError: If the body raises a `SafetensorError`.
    """
    try:
        yield
    except SafetensorError as error:
        folder = Path(checkpoint or "")
        broken = [str(file) for file in sorted(folder.glob("*.safetensors")) if not _is_readable(file)]
        raise OSError(
            f"{', '.join(broken) or checkpoint} is not a readable safetensors file ({error}). Download or convert it "
            "again."
        ) from error


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _prefix_in(names: Any, prefix: str) -> str:
    """Prefix of the part's tensors in a whole model, in its base model, or in a checkpoint of the part alone."""
    for candidate in (f"model.{prefix}.", f"{prefix}."):
        if any(name.startswith(candidate) for name in names):
            return candidate
    return ""


def _with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, as transformers names variants."""
    stem, extension = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{extension}"


def placeholder_lengths(is_placeholder: torch.Tensor) -> list[int]:
    """Lengths of the runs of placeholders, in order of appearance.

    Args:
        is_placeholder: Boolean mask over the ids, `[batch, sequence]`.
    """
    padded = torch.nn.functional.pad(is_placeholder.int(), (1, 1))
    steps = padded.diff(dim=-1).flatten()
    starts, ends = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    return (ends - starts).tolist()


def split_image_features(is_placeholder: torch.Tensor, image_features: torch.Tensor) -> list[int]:
    """Tokens of every image whose features `[total tokens, hidden]` were handed over, read off the placeholders.

    Raises:
        ValueError: If there are not as many placeholders as tokens.
    """
    lengths = placeholder_lengths(is_placeholder)
    if sum(lengths) != len(image_features):
        raise ValueError(
            f"The prompts hold {sum(lengths)} image placeholders, but image_features has {len(image_features)} "
            "tokens. Pass the two as the processor returned them together. Did truncation cut an image?"
        )
    return lengths


def find_empty_placeholders(
    is_placeholder: torch.Tensor, num_tokens: list[int], num_patches: int
) -> torch.Tensor | None:
    """Tells which placeholders stay empty.

    Args:
        is_placeholder: Boolean mask over the ids, `[batch, sequence]`.
        num_tokens: Tokens of every image, in order of appearance.
        num_patches: Patches per image.

    Returns:
        Boolean mask like `is_placeholder`, or `None` if all placeholders are filled.

    Raises:
        ValueError: If placeholders and images do not fit together.
    """
    lengths = placeholder_lengths(is_placeholder)
    is_flat = len(num_tokens) == 1  # Chunked prefill passes all features of a chunk as one.
    if lengths == [count for count in num_tokens if count > 0] or (is_flat and sum(lengths) == num_tokens[0]):
        return None
    if lengths != [num_patches] * len(num_tokens):
        raise ValueError(
            f"The prompts hold {len(lengths)} images with {lengths} placeholders, but features of {len(num_tokens)} "
            f"images with {num_tokens} tokens were given. Each image needs as many placeholders as it has tokens, or "
            f"{num_patches} (one per patch). Did truncation cut an image, does a prompt lack one, or are images "
            "passed again that past_key_values holds already?"
        )
    counts = torch.tensor(num_tokens, device=is_placeholder.device)
    is_empty = torch.zeros_like(is_placeholder)
    is_empty[is_placeholder] = (
        torch.arange(num_patches, device=counts.device) < num_patches - counts[:, None]
    ).flatten()
    return is_empty


def full_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past: int) -> torch.Tensor:
    """The attention mask over `past` cached positions and `input_ids` `[batch, sequence]`, all ones by default.

    Raises:
        ValueError: If the mask is not `[batch, past + sequence]`.
    """
    if attention_mask is None:
        return torch.ones(len(input_ids), past + input_ids.shape[1], dtype=torch.long, device=input_ids.device)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError("The attention mask must be 2D when images have one placeholder per patch.")
    return attention_mask


def pack_rows(is_empty: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewrites rows so that everything empty or padded comes first, in the same width.

    Packed rows are ordinary left-padded ones: sliding windows and caches hold nothing but real tokens.

    Args:
        is_empty: Mask of empty placeholders, `[batch, sequence]`.
        attention_mask: Mask of real tokens, `[batch, sequence]`.

    Returns:
        Order in which to take the positions, the attention mask of the packed rows, and where each given position
        went, all `[batch, sequence]`. What was left out points to the last real position before it.
    """
    is_real = attention_mask.bool() & ~is_empty
    order = is_real.int().argsort(dim=-1, stable=True)
    ranks = is_real.long().cumsum(dim=-1)
    num_padding = is_real.shape[1] - ranks[:, -1:]
    return order, is_real.gather(-1, order).to(attention_mask.dtype), (num_padding + ranks - 1).clamp_min(0)


def trim_rows(
    order: torch.Tensor, packed_mask: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves out the leading positions that are padding in all packed rows.

    Args:
        order: See `pack_rows`, as are the others.
        packed_mask: Mask of the packed rows.
        source: Where each given position went.

    Returns:
        The first two narrowed to `[batch, longest row]`, and `source` `[batch, sequence]` shifted by as much.
    """
    longest = max(int(packed_mask.sum(dim=-1).max()), 1)
    num_padding = order.shape[1] - longest
    return order[:, num_padding:], packed_mask[:, num_padding:], (source - num_padding).clamp_min(0)


# With a single row BLAS is as fast as memory, and from about here on it uses all cores by itself.
_FEWEST_ROWS, _MOST_ROWS = 2, 16


_FEWEST_WEIGHTS = 1 << 18  # smaller ones are multiplied before another core has heard of it


def split_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Same as `torch.nn.functional.linear`, up to rounding, and faster for a few rows on a CPU.

    Args:
        hidden: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.

    Returns:
        `[..., out]`.
    """
    if torch.compiler.is_compiling() or not _is_worth_it(hidden, weight, num_parts := torch.get_num_threads()):
        return F.linear(hidden, weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1])
    rest = len(weight) % num_parts
    parts = weight[: len(weight) - rest].unflatten(0, (num_parts, -1))
    # A batched product runs its matrices in parallel: [parts, rows, out / parts].
    product = torch.bmm(rows.expand(num_parts, -1, -1), parts.transpose(1, 2)).transpose(0, 1).flatten(1)
    if rest:
        product = torch.cat([product, F.linear(rows, weight[-rest:])], dim=-1)
    if bias is not None:
        product = product + bias
    return product.view(*hidden.shape[:-1], -1)


def _is_worth_it(hidden: torch.Tensor, weight: torch.Tensor, num_threads: int) -> bool:
    if num_threads == 1 or hidden.device.type != "cpu" or not hidden.dtype == weight.dtype == torch.float32:
        return False
    num_rows = hidden.numel() // hidden.shape[-1]
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and not torch.is_autocast_enabled("cpu")
    is_large = weight.numel() >= _FEWEST_WEIGHTS and len(weight) >= num_threads
    return is_plain and is_large and _FEWEST_ROWS <= num_rows <= _MOST_ROWS


class SplitLinears:
    """Within this context the plain linear layers of a model run as [`split_linear`].

    Layers of another class (quantized or adapted ones), and those whose forward somebody else has replaced (offloading
    does), stay as they are.

    Args:
        model: The model that decodes.
    """

    def __init__(self, model: nn.Module):
        layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        # Set past `Module.__setattr__`, which costs more than some of the layers.
        self._replacements = [(vars(layer), functools.partial(_forward, layer)) for layer in layers]

    def __enter__(self) -> None:
        for attributes, forward in self._replacements:
            attributes["forward"] = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attributes, _ in self._replacements:
            attributes.pop("forward", None)


def _forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return split_linear(input, layer.weight, layer.bias)


Generators = torch.Generator | list[torch.Generator] | None


def is_inside_image(input_ids: torch.Tensor, config: LavitConfig) -> torch.Tensor:
    """Whether rows `[batch, sequence]` end inside an image, `[batch]`: the last start comes after the last end."""
    ranks = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last_start = (ranks * torch.eq(input_ids, config.boi_token_id)).amax(dim=-1)
    last_end = (ranks * torch.eq(input_ids, config.eoi_token_id)).amax(dim=-1)
    return last_start > last_end


def add_unconditional_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, config: LavitConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubles a batch: every row gets a twin that sees nothing before its open image.

    Args:
        input_ids: `[batch, sequence]`.
        attention_mask: `[batch, sequence]`.
        config: Its visual ids.

    Returns:
        Ids and mask `[2 * batch, sequence]`, twins last. If a prompt ends outside images, its twin sees the last id.
    """
    ranks = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_start = (ranks * torch.eq(input_ids, config.boi_token_id)).amax(dim=-1)
    first_seen = torch.where(is_inside_image(input_ids, config), last_start, input_ids.shape[1] - 1)
    # Continuous images cannot be seen by a twin, so they need no features there.
    twins = input_ids.masked_fill(torch.eq(input_ids, config.image_token_id), 0)
    twin_mask = (ranks >= first_seen[:, None]).to(attention_mask.dtype)
    return torch.cat([input_ids, twins]), torch.cat([attention_mask, twin_mask])


def add_negative_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    negative_ids: torch.Tensor,
    negative_mask: torch.Tensor | None,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubles a batch with given twins, `[batch or 1, negative sequence]`; pads whichever is shorter on the left.

    Raises:
        ValueError: If there is neither one negative prompt nor one per prompt.
    """
    if len(negative_ids) not in (1, len(input_ids)):
        raise ValueError(
            f"Got {len(negative_ids)} negative prompts for {len(input_ids)} prompts; pass one, or as many."
        )
    negative_ids = negative_ids.expand(len(input_ids), -1).to(input_ids.device)
    mask = torch.ones_like(negative_ids) if negative_mask is None else negative_mask.to(negative_ids)
    mask = mask.expand(len(input_ids), -1).to(attention_mask.dtype)
    width = max(input_ids.shape[1], negative_ids.shape[1])
    return (
        torch.cat([_pad_left(input_ids, width, pad_token_id), _pad_left(negative_ids, width, pad_token_id)]),
        torch.cat([_pad_left(attention_mask, width, 0), _pad_left(mask, width, 0)]),
    )


def _pad_left(rows: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=value)


class SuppressIds(LogitsProcessor):
    """Never generates the given ids; those beyond the vocabulary are ignored.

    transformers' own processor takes them from an option, which may be the user's.
    """

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids = self.ids.to(scores.device)
        return scores.index_fill(-1, self.ids[self.ids < scores.shape[-1]], -torch.inf)


@dataclass
class VisualSampler:
    """Decodes rows of text and visual ids; passed to `generate` as `custom_generate`.

    Args:
        guidance_scale: Weight of guidance on log-probabilities, `unconditional + scale * (conditional -
            unconditional)`; with 1 rows have no twins.
        generator: Draws tokens, one for the batch or one per returned sequence. The global random state is used only
            without it.
        vocab_slice: The model computes logits of ids `[first, last)` only; all others are never generated.
        is_interleaved: Whether rows switch between text and images. Inside an image only codes and its end are
            allowed, and guidance applies; outside only text and the image start.
        streamer: Receives the prompt, then every new id.
        given_processors: Processors of logits that come from the caller, and so know of no twins.

    Raises:
        TypeError: A generator is something else.
        ValueError: `guidance_scale` is not finite.
    """

    guidance_scale: float = 1.0
    generator: Generators = None
    vocab_slice: tuple[int, int] | None = None
    is_interleaved: bool = False
    streamer: BaseStreamer | None = None
    given_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}.")
        given = self.generator if isinstance(self.generator, list) else [self.generator]
        for one in given:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or a list of them, got {type(one).__name__}.")

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Runs the loop; see `GenerationMixin._sample`, whose contract it follows.

        Args:
            model: The model that generates.
            input_ids: Prompts, `[rows, sequence]`, their twins last.
            logits_processor: Applied to scores `[batch, vocabulary]`, twins not included.
            stopping_criteria: Decide per prompt.
            generation_config: Prepared by `generate`.
            model_kwargs: Model inputs beside the ids.
        """
        rows, batch_size = input_ids, len(input_ids) // (2 if self.is_guided else 1)
        self._check_generators(batch_size)
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError(
                "Attentions and hidden states are not returned here: call the model itself on the ids that were drawn."
            )
        if self.is_guided:
            self._forget_twins(logits_processor)
        inside = is_inside_image(rows[:batch_size], model.config)
        image_lengths = torch.zeros_like(inside, dtype=torch.long)
        unfinished = torch.ones_like(inside)
        scores: tuple[torch.Tensor, ...] = ()
        logits: tuple[torch.Tensor, ...] = ()
        if self.streamer is not None:
            self.streamer.put(rows[:batch_size].cpu())
        is_compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = model.get_compiled_call(generation_config.compile_config) if is_compiled else model.__call__
        is_on_cpu = rows.device.type == "cpu" and not is_compiled
        linears = SplitLinears(model.model.language_model) if is_on_cpu else nullcontext()
        if self.is_interleaved and self.is_guided and model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = torch.ones_like(rows)  # `generate` drops masks without zeros.
        outputs = model._prefill(rows, generation_config, model_kwargs, is_first_iteration=True)
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            next_logits = self._combine(outputs.logits[:, -1].float().to(rows.device), inside, model.config)
            if self.is_interleaved:
                next_logits = next_logits.masked_fill(self._forbidden(inside, image_lengths, model), -torch.inf)
            next_scores = logits_processor(rows[:batch_size], next_logits)
            may_end = generation_config._pad_token_tensor is not None
            next_ids = self._pick(next_scores, generation_config.do_sample, unfinished if may_end else None)
            if may_end:
                next_ids = torch.where(unfinished, next_ids, generation_config._pad_token_tensor.to(rows.device))
            if generation_config.return_dict_in_generate:
                scores += (next_scores,) if generation_config.output_scores else ()
                logits += (next_logits,) if generation_config.output_logits else ()
            rows = torch.cat([rows, next_ids.repeat(len(rows) // batch_size)[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(next_ids.cpu())
            if self.is_interleaved:
                self._hide_past_of_twins(inside, model_kwargs)
                inside = (inside & (next_ids != model.config.eoi_token_id)) | (next_ids == model.config.boi_token_id)
                image_lengths = torch.where(inside, image_lengths + 1, 0)
            unfinished = unfinished & ~stopping_criteria(rows[:batch_size], scores)
            if not unfinished.any():
                break
            del outputs
            step = 1 if model_kwargs["use_cache"] else None
            model_inputs = model.prepare_inputs_for_generation(rows, next_sequence_length=step, **model_kwargs)
            with linears:
                outputs = forward(**model_inputs, return_dict=True)
        if self.streamer is not None:
            self.streamer.end()
        cache = self._without_twins(model_kwargs.get("past_key_values"), batch_size)
        if not generation_config.return_dict_in_generate:
            return rows[:batch_size]
        return GenerateDecoderOnlyOutput(
            sequences=rows[:batch_size],
            scores=scores or None,
            logits=logits or None,
            past_key_values=cache,
        )

    def _combine(self, logits: torch.Tensor, inside: torch.Tensor, config: LavitConfig) -> torch.Tensor:
        """Applies guidance and spreads logits over the vocabulary: `[rows, computed]` -> `[batch, vocabulary]`."""
        if self.is_guided:
            conditional, unconditional = logits.log_softmax(dim=-1).chunk(2)
            guided = torch.lerp(unconditional, conditional, self.guidance_scale)
            logits = torch.where(inside[:, None], guided, conditional) if self.is_interleaved else guided
        if self.vocab_slice is None:
            return logits
        everything = logits.new_full((len(logits), config.text_config.vocab_size), -torch.inf)
        everything[:, slice(*self.vocab_slice)] = logits
        return everything

    def _forbidden(self, inside: torch.Tensor, image_lengths: torch.Tensor, model: Any) -> torch.Tensor:
        """Ids that a row cannot go on with, `[batch, vocabulary]`."""
        config = model.config
        is_visual = torch.zeros(config.text_config.vocab_size, dtype=torch.bool, device=inside.device)
        is_visual[config.visual_token_ids] = True
        in_text, in_image, at_limit = is_visual.clone(), ~is_visual, torch.ones_like(is_visual)
        in_text[config.boi_token_id], in_image[config.boi_token_id] = False, True
        at_limit[config.eoi_token_id] = False
        forbidden = torch.where(inside[:, None], in_image, in_text)
        # `image_lengths` counts the start, too: as many codes as there are patches may follow it.
        is_full = image_lengths > config.visual_tokenizer_config.num_patches
        return torch.where(is_full[:, None], at_limit, forbidden)

    def _hide_past_of_twins(self, inside: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Twins outside images see only their newest id, so that an image that starts has no context but its start."""
        if not self.is_guided:
            return
        outside = torch.cat([torch.zeros_like(inside), ~inside])
        mask = model_kwargs["attention_mask"]
        mask[:, :-1] = mask[:, :-1].masked_fill(outside[:, None], 0)
        if model_kwargs.get("position_ids") is not None:
            positions = model_kwargs["position_ids"]
            positions[:, -1] = positions[:, -1].masked_fill(outside, 0)

    def _pick(self, scores: torch.Tensor, do_sample: bool, unfinished: torch.Tensor | None) -> torch.Tensor:
        """Chooses the next id of every row, `[batch, vocabulary]` -> `[batch]`; of finished rows it means nothing."""
        if not do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        if not isinstance(self.generator, list):
            return _draw(probabilities, self.generator)
        # The generator of a finished row stays where it is: what is drawn from it later must not depend on how long
        # the others are.
        picked = scores.new_zeros(len(scores), dtype=torch.long)
        for row in range(len(scores)) if unfinished is None else unfinished.nonzero().flatten().tolist():
            picked[row] = _draw(probabilities[row, None], self.generator[row])[0]
        return picked

    def _check_generators(self, batch_size: int) -> None:
        if isinstance(self.generator, list) and len(self.generator) != batch_size:
            raise ValueError(
                f"Got {len(self.generator)} generators for {batch_size} sequences; pass one, or one per sequence."
            )

    def _without_twins(self, cache: Any, batch_size: int) -> Any:
        if self.is_guided and cache is not None:
            cache.reorder_cache(torch.arange(batch_size))  # `batch_select_indices` is for dynamic caches only
        return cache

    def _forget_twins(self, logits_processor: LogitsProcessorList) -> None:
        """Fits processors to prompts without twins: some of transformers' remember all rows that they were made with.

        A repetition penalty remembers one row per returned sequence, the others one per prompt; twins are the second
        half of either.
        """
        for processor in logits_processor:
            if any(processor is given for given in self.given_processors):
                continue
            for name in ("prompt_ignore_length", "encoder_input_ids"):
                if isinstance(rows := getattr(processor, name, None), torch.Tensor):
                    setattr(processor, name, rows[: len(rows) // 2])
            if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
                processor.batch_size //= 2  # of its n-grams, one entry per prompt, it takes the first then


def _draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = probabilities.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator)[:, 0].to(probabilities.device)


GENERATION_MODES = ("text", "image", "interleaved")


class _Options:
    """Generation options of a call, wherever they were given.

    Args:
        generation_config: That of the call; copied, because options are set in it if there is one. transformers does
            not like keyword arguments beside it.
        default: That of the model.
        kwargs: Keyword arguments of the call, which come first.
    """

    def __init__(self, generation_config: GenerationConfig | None, default: GenerationConfig, kwargs: dict[str, Any]):
        self.generation_config = copy.deepcopy(generation_config)
        self.kwargs = kwargs
        self._configs = [config for config in (self.generation_config, default) if config is not None]

    def get(self, name: str) -> Any:
        """The option's value, `None` if it is set nowhere."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        return next((value for config in self._configs if (value := getattr(config, name, None)) is not None), None)

    def set(self, name: str, value: Any) -> None:
        """Sets an option where the call has its own."""
        if self.generation_config is None:
            self.kwargs[name] = value
        else:
            self.kwargs.pop(name, None)
            setattr(self.generation_config, name, value)


class LavitGenerationMixin(GenerationMixin):
    """`generate` for prompts with images, in both forms that the processor gives them, and for drawing."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        generation_mode: str | None = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> torch.Tensor | Any:
        """Generates text, visual tokens, or both, from text and images.

        Args:
            inputs: Prompt ids, `[batch, sequence]`; or pass `input_ids`.
            generation_config: See [`GenerationMixin.generate`].
            logits_processor: See [`GenerationMixin.generate`].
            args: See [`GenerationMixin.generate`].
            generation_mode: `"text"` (default) never generates visual ids. `"image"` draws one image after a prompt
                that ends with an image start (the processor's `generation_mode="image"`): only codes and the image end
                are generated (unless `suppress_tokens` says what is not), and each row stops at its end.
                `"interleaved"` goes on with text and images.
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
        self._restore_cached_mask(kwargs)
        prompt = kwargs.get("input_ids")
        new_mask = self._prepare_images(kwargs)
        options = _Options(generation_config, self.generation_config, kwargs)
        sampler = self._build_sampler(mode, generator, options)
        processors = LogitsProcessorList(logits_processor or [])
        processors.append(SuppressIds(self._forbidden_ids(mode, sampler, options)))
        if sampler is not None:
            sampler.given_processors = tuple(logits_processor or ())
            kwargs["custom_generate"] = sampler
        output = super().generate(None, options.generation_config, processors, *args, **kwargs)
        return self._restore_prompt(output, prompt, kwargs.get("input_ids"), new_mask)

    def _forbidden_ids(self, mode: str, sampler: VisualSampler | None, options: _Options) -> list[int]:
        """Ids that the mode never generates; the placeholder is one even after the embeddings have been resized."""
        forbidden = [self.config.image_token_id]
        if mode == "text":
            forbidden += self.config.visual_token_ids
        elif mode == "image" and sampler.vocab_slice is None and options.get("suppress_tokens") is None:
            allowed = set(self._drawable_ids())
            forbidden += [id for id in range(self.config.text_config.vocab_size) if id not in allowed]
        return forbidden

    def _drawable_ids(self) -> list[int]:
        start = self.config.boi_token_id  # looked up once: attributes of a configuration are slow
        return [id for id in self.config.visual_token_ids if id != start]

    def _build_sampler(self, mode: str, generator: Generators, options: _Options) -> VisualSampler | None:
        """Takes from the options what only our own decoding loop understands.

        Returns:
            The loop to use, or `None` if that of `GenerationMixin` will do.
        """
        kwargs = options.kwargs
        if mode == "text":
            if generator is None:
                return None
            self._check_one_by_one(options, "generator")
            return VisualSampler(generator=generator, streamer=kwargs.pop("streamer", None))
        self._check_one_by_one(options, f"generation_mode={mode!r}")
        guidance_scale = options.get("guidance_scale")
        sampler = VisualSampler(
            guidance_scale=1.0 if guidance_scale is None else float(guidance_scale),
            generator=generator,
            is_interleaved=mode == "interleaved",
            streamer=kwargs.pop("streamer", None),
        )
        options.set("guidance_scale", 1.0)  # Otherwise transformers would run its own guidance on top.
        if mode == "image":
            self._prepare_drawing(sampler, options)
        if sampler.is_guided:
            self._add_twins(mode, options)
        elif kwargs.pop("negative_prompt_ids", None) is not None:
            raise ValueError("negative_prompt_ids have no effect without guidance_scale.")
        return sampler

    def _prepare_drawing(self, sampler: VisualSampler, options: _Options) -> None:
        input_ids = options.kwargs.get("input_ids")
        if input_ids is None or not is_inside_image(input_ids, self.config).all():
            raise ValueError(
                'To draw, every prompt has to end with the image start. Use `processor(..., generation_mode="image")`.'
            )
        if options.kwargs.get("eos_token_id") is None:
            options.set("eos_token_id", self.config.eoi_token_id)
        if options.get("max_new_tokens") is None and not options.get("max_length"):
            options.set("max_new_tokens", self.config.visual_tokenizer_config.num_patches + 1)
        drawable = self._drawable_ids()
        is_contiguous = drawable == list(range(drawable[0], drawable[-1] + 1))
        if options.get("suppress_tokens") is None and is_contiguous:
            sampler.vocab_slice = options.kwargs["vocab_slice"] = (drawable[0], drawable[-1] + 1)

    def _add_twins(self, mode: str, options: _Options) -> None:
        kwargs = options.kwargs
        input_ids = kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        is_filled = cache is not None and int(cache.get_seq_length()) > 0
        if input_ids is None or is_filled or kwargs.get("position_ids") is not None:
            raise ValueError(
                "Guidance needs input_ids, and can go on neither from filled past_key_values nor with given "
                "position_ids."
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
        kwargs["input_ids"], kwargs["attention_mask"] = add_negative_rows(
            input_ids, mask, negative_ids, negative_mask, self._padding_id()
        )

    def _padding_id(self) -> int:
        """Some text id to pad with under a mask."""
        pad_token_id = self.generation_config.pad_token_id
        return pad_token_id if isinstance(pad_token_id, int) else 0

    @staticmethod
    def _check_one_by_one(options: _Options, what: str) -> None:
        num_beams = options.get("num_beams") or 1
        if num_beams > 1:
            raise ValueError(f"{what} cannot be combined with num_beams={num_beams}; sample or decode greedily.")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if options.get(name):
                raise ValueError(f"{what} cannot be combined with {name}: ids are generated one by one.")

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        # Penalties that compare with the prompt look its ids up in the scores, where placeholders are not. Images
        # begin with their start, so that this one says nothing new.
        if encoder_input_ids is not None and not encoder_input_ids.is_floating_point():  # else: embeddings
            is_placeholder = encoder_input_ids == self.config.image_token_id
            encoder_input_ids = encoder_input_ids.masked_fill(is_placeholder, self.config.boi_token_id)
        return super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)

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
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features", "mm_encoder_outputs")}
        input_ids = kwargs.get("input_ids")
        past = self._cached_length(kwargs, input_ids)
        new_ids = None if input_ids is None else input_ids[:, past:]
        if past > 0 and not torch.eq(new_ids, self.config.image_token_id).any():
            # An assistant model gets them in every round, cached or not.
            images["mm_encoder_outputs"] = None
        encoded = self.model.encode_images(new_ids, **images)
        if encoded is None or input_ids is None:
            return None
        kwargs["mm_encoder_outputs"] = {"image": encoded}
        is_empty = find_empty_placeholders(
            torch.eq(input_ids[:, past:], self.config.image_token_id),
            [len(tokens) for tokens in encoded.pooler_output],
            self.config.visual_tokenizer_config.num_patches,
        )
        return None if is_empty is None else self._pack_new_ids(kwargs, is_empty, past)

    @staticmethod
    def _cached_length(kwargs: dict[str, Any], input_ids: torch.Tensor | None) -> int:
        """Leading positions of `input_ids` that `past_key_values` holds already."""
        cache = kwargs.get("past_key_values")
        if cache is None or input_ids is None or kwargs.get("use_cache") is False:
            return 0
        past = int(cache.get_seq_length())
        return past if past < input_ids.shape[1] else 0

    def _pack_new_ids(self, kwargs: dict[str, Any], is_empty: torch.Tensor, past: int) -> torch.Tensor:
        if kwargs.get("position_ids") is not None:
            raise ValueError("Leave position_ids out when images have one placeholder per patch.")
        input_ids = kwargs["input_ids"]
        mask = full_mask(kwargs.get("attention_mask"), input_ids, 0)
        order, packed_mask, _ = pack_rows(is_empty, mask[:, past:])
        new_ids = input_ids[:, past:].masked_fill(is_empty, self._padding_id()).gather(-1, order)
        kwargs["input_ids"] = torch.cat([input_ids[:, :past], new_ids], dim=1)
        kwargs["attention_mask"] = torch.cat([mask[:, :past], packed_mask], dim=1)
        return kwargs["attention_mask"]

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


# Logits of forbidden keys may exceed those of the allowed ones without limit, and with them the gradient of allowing
# them: e^10 is more than any decision needs, and far from overflow.
_MAX_EXCESS = 10.0


def relaxed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """[`~merger.smoothed_attention`] with a mask of floating point, exactly 0 or 1, that gets a gradient.

    The result is the same; the gradient of the mask says what allowing or forbidding a key would change. A query that
    may look at nothing passes none, because there a first key changes everything at once.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, head_dim]`.
        mask: Broadcastable to `[batch, 1, queries, keys]`, 1 where a query may look at a key.
        smoothing: Epsilon of the formula.

    Returns:
        `[batch, heads, queries, head_dim]` in the dtype of `value`.
    """
    is_allowed = mask > 0
    mask = torch.where(is_allowed.any(dim=-1, keepdim=True), mask, mask.detach())
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.matmul(query.float() * query.shape[-1] ** -0.5, key.float().transpose(-1, -2))
        seen = logits if smoothing else logits.masked_fill(~is_allowed, torch.finfo(logits.dtype).min)
        excess = logits - seen.amax(dim=-1, keepdim=True).detach()  # a shift, which no softmax notices
        weights = excess.clamp(max=_MAX_EXCESS).exp() * mask
        total = weights.sum(dim=-1, keepdim=True)
        if smoothing:
            weights = (weights + smoothing / key.shape[-2]) / (total + smoothing)
        else:
            weights = weights / (total + (total == 0))
        return torch.matmul(weights.to(value.dtype), value)


def smoothed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Attention with the smoothed weights of LaVIT, computed in fp32.

    `w = (exp(l - m) * mask + smoothing / N) / (sum(exp(l - m) * mask) + smoothing)` over `N` keys, where `m` is the
    largest of all logits, masked ones too. With smoothing 0 this is a masked softmax (`m` over the allowed logits),
    and a query that may look at nothing gets zeros.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, head_dim]`.
        mask: Boolean, broadcastable to `[batch, 1, queries, keys]`, true where a query may look at a key.
        smoothing: Epsilon of the formula.

    Returns:
        `[batch, heads, queries, head_dim]` in the dtype of `value`.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.matmul(query.float() * query.shape[-1] ** -0.5, key.float().transpose(-1, -2))
        if smoothing == 0:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * mask
        total = weights.sum(dim=-1, keepdim=True)
        if smoothing == 0:
            weights = weights / total.clamp_min(torch.finfo(total.dtype).tiny)
        else:
            weights = (weights + smoothing / key.shape[-2]) / (total + smoothing)
        return torch.matmul(weights.to(value.dtype), value)


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Masked softmax attention in fp32 by `scaled_dot_product_attention`; same arguments as [`smoothed_attention`].

    Every query needs at least one allowed key.
    """
    with torch.autocast(query.device.type, enabled=False):
        output = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return output.to(value.dtype)


def split_heads(hidden: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[batch, positions, width]` -> `[batch, heads, positions, head_dim]`."""
    return hidden.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(hidden: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, positions, head_dim]` -> `[batch, positions, width]`."""
    return hidden.transpose(1, 2).flatten(-2)


def gather_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Picks `positions` `[batch, picked]` out of `hidden` `[batch, num_patches, ...]`."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions]


class LavitSelfAttention(nn.Module):
    """Projections of a self-attention with packed query, key and value weights."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(hidden).chunk(3, dim=-1))
        return query, key, value


class LavitCrossAttention(nn.Module):
    """Projections of a cross-attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def project(self, hidden: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = split_heads(self.q_proj(hidden), self.num_heads)
        key = split_heads(self.k_proj(source), self.num_heads)
        return query, key, split_heads(self.v_proj(source), self.num_heads)


class LavitMLP(nn.Module):
    """Two-layer perceptron of a transformer block."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.act = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class LavitMergerLayer(GradientCheckpointingLayer):
    """Pre-norm block: causal self-attention over kept patches, cross-attention to dropped ones, MLP."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        width, heads = config.hidden_size, config.merger_num_heads
        self.smoothing = config.attention_smoothing
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = LavitSelfAttention(width, heads)
        self.cross_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attn = LavitCrossAttention(width, heads)
        self.mlp_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = LavitMLP(width, config.merger_intermediate_size, config.hidden_act)

    def forward(
        self,
        hidden: torch.Tensor,
        source: torch.Tensor,
        self_mask: torch.Tensor,
        cross_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        has_dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden: State of the patches, `[batch, patches, hidden]`.
            source: Normalized features that cross-attention looks at, `[batch, sources, hidden]`.
            self_mask: `[batch, 1, patches, patches]`, true where a patch may look at another.
            cross_mask: `[batch, 1, 1, sources]`, true at the dropped patches.
            positions: Compute the state of these patches only, `[batch, picked]`; all of them by default.
            has_dropped: `[batch, 1, 1, 1]`, false for images without dropped patches, whose cross-attention is zero.
                If given, attention is fused and without smoothing.

        Returns:
            The new state, `[batch, patches or picked, hidden]`.
        """
        query, key, value = self.self_attn.project(self.self_attn_layer_norm(hidden))
        if positions is not None:
            hidden = gather_positions(hidden, positions)
            query = gather_positions(query.transpose(1, 2), positions).transpose(1, 2)
            self_mask = gather_positions(self_mask[:, 0], positions)[:, None]
        is_fused = has_dropped is not None
        attended = self._attend(query, key, value, self_mask, is_fused)
        hidden = hidden + self.self_attn.out_proj(merge_heads(attended))

        query, key, value = self.cross_attn.project(self.cross_attn_layer_norm(hidden), source)
        attended = self._attend(query, key, value, cross_mask, is_fused)
        if has_dropped is not None:
            attended = attended * has_dropped.to(attended.dtype)
        hidden = hidden + self.cross_attn.out_proj(merge_heads(attended))
        return hidden + self.mlp(self.mlp_layer_norm(hidden))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, is_fused: bool
    ) -> torch.Tensor:
        if is_fused:
            return fused_attention(query, key, value, mask)
        if mask.is_floating_point():
            return relaxed_attention(query, key, value, mask, self.smoothing)
        return smoothed_attention(query, key, value, mask, self.smoothing)


class LavitMerger(nn.Module):
    """Turns the features of all patches into one token for every kept patch."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        self.smoothing = config.attention_smoothing
        self.norm_features = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([LavitMergerLayer(config) for _ in range(config.merger_num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def output_projections(self) -> list[nn.Linear]:
        """What adds to the hidden states; where these are zero, kept patches only pass through to the norm."""
        layers: Any = self.layers
        return [
            part for layer in layers for part in (layer.self_attn.out_proj, layer.cross_attn.out_proj, layer.mlp.fc2)
        ]

    def forward(self, patch_features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_features: `[batch, num_patches, hidden]`.
            keep_mask: Boolean `[batch, num_patches]`, true where a patch is kept.

        Returns:
            Tokens of the kept patches in raster order, image after image, `[total kept, hidden]`.
        """
        if not keep_mask.any():
            if not self.training:
                return patch_features.new_empty(0, patch_features.shape[-1])
            # Processes that train together wait for one another in every layer, so none may leave layers out.
            return self(patch_features, torch.ones_like(keep_mask))[:0]
        if self.smoothing == 0:
            return self._forward_kept(patch_features, keep_mask)
        positions, is_kept = padded_positions(keep_mask)
        return self.forward_all(patch_features, keep_mask, positions)[is_kept]

    def forward_all(
        self, patch_features: torch.Tensor, keep_mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes every patch, `[batch, num_patches, hidden]`; `positions` restricts what the last block returns.

        A `keep_mask` of floating point, exactly 0 or 1, gives the same and gets a gradient.
        """
        is_soft = keep_mask.is_floating_point()
        self_mask, dropped = _self_mask(keep_mask), 1 - keep_mask if is_soft else ~keep_mask
        cross_mask = dropped[:, None, None, :]
        hidden, source = patch_features, self.norm_features(patch_features)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            hidden = layer(hidden, source, self_mask, cross_mask, positions if is_last else None)
        return self.norm(hidden)

    def _forward_kept(self, patch_features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
        kept, is_kept = padded_positions(keep_mask)
        dropped, is_dropped = padded_positions(~keep_mask)
        hidden = gather_positions(patch_features, kept)
        source = self.norm_features(gather_positions(patch_features, dropped))
        has_dropped = is_dropped.any(dim=-1)[:, None, None, None]
        # Padding comes last, so a causal mask hides it from every kept patch and leaves each query at least itself.
        self_mask = torch.ones(kept.shape[1], kept.shape[1], dtype=torch.bool, device=kept.device).tril()
        cross_mask = is_dropped[:, None, None, :] | ~has_dropped
        for layer in self.layers:
            hidden = layer(hidden, source, self_mask, cross_mask, None, has_dropped)
        return self.norm(hidden[is_kept])


def padded_positions(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices where `mask` `[batch, num_patches]` is true, padded to the longest row.

    Returns:
        Indices `[batch, longest]` (at least one column; padding is arbitrary) and their validity, of the same shape.
    """
    counts = mask.sum(dim=-1)
    longest = max(int(counts.max()), 1)
    # A stable sort puts the true positions first and keeps their order.
    positions = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    return positions, torch.arange(longest, device=mask.device) < counts[:, None]


def _self_mask(keep_mask: torch.Tensor) -> torch.Tensor:
    num_patches = keep_mask.shape[1]
    causal = torch.ones(num_patches, num_patches, dtype=torch.bool, device=keep_mask.device).tril()
    itself = torch.eye(num_patches, dtype=torch.bool, device=keep_mask.device)
    if keep_mask.is_floating_point():
        return torch.where(itself, 1, causal * keep_mask[:, None, :])[:, None]
    return ((causal & keep_mask[:, None, :]) | itself)[:, None]


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
        pre_quantized = self.proj_out(self.proj_in(features).tanh())
        return self.lookup(pre_quantized), pre_quantized

    def lookup(self, pre_quantized: torch.Tensor) -> torch.Tensor:
        """Nearest codebook row of every token, by squared distance in fp32: `[tokens, codebook_dim]` -> `[tokens]`."""
        with torch.autocast(pre_quantized.device.type, enabled=False):
            tokens = F.normalize(pre_quantized.float(), dim=-1)
            # Called, not read: an offloaded codebook is loaded by its forward hook.
            codebook = self.codebook(torch.arange(self.codebook.num_embeddings, device=tokens.device)).float()
            # |t|^2 is the same for every row, so it cannot change which one is nearest.
            return (codebook.square().sum(dim=-1) - 2 * tokens @ codebook.T).argmin(dim=-1)


KEEP = 0


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
    log_probs: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Decides which patches to keep.

    Args:
        log_probs: Scores of [`LavitSelector`], `[batch, num_patches, 2]`.
        generator: Samples the decision (as the original does at inference) from this generator, or from one generator
            per image. Without it a patch is kept where keeping is likelier than dropping, which is reproducible.

    Returns:
        Boolean mask `[batch, num_patches]`, true where the patch is kept.

    Raises:
        ValueError: If the scores are not finite, or the number of generators is not the number of images.
    """
    if not torch.isfinite(log_probs).all():
        raise ValueError(
            "The selector's scores are not finite: the pixel values contain NaN or infinity, or the weights are "
            "corrupt."
        )
    if generator is None:
        return log_probs[..., KEEP] > log_probs[..., 1 - KEEP]
    return _uniform(log_probs.shape[:2], generator).to(log_probs.device) < log_probs[..., KEEP].exp()


def _uniform(shape: torch.Size, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"Got {len(generator)} generators for {shape[0]} images; pass one, or one per image.")
    return torch.stack([torch.rand(shape[1:], generator=one, device=one.device).cpu() for one in generator])


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


class LavitBranch(nn.Module):
    """Selector and merger that were trained together, and the quantizer of the discrete branch."""

    def __init__(self, config: LavitVisualTokenizerConfig, has_quantizer: bool):
        super().__init__()
        self.selector = LavitSelector(config)
        self.merger = LavitMerger(config)
        self.quantizer = LavitQuantizer(config) if has_quantizer else None


def build_vision_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a vision encoder without the final norm of BLIP-2's: LaVIT reads the raw residual stream."""
    if config.model_type != "blip_2_vision_model":
        return AutoModel.from_config(config, **without_pooler(config))
    # Not in the Auto mapping; imported here because it costs a second that `import lavit_hf` should not.
    from transformers import Blip2VisionModel

    model = Blip2VisionModel(config)
    model.post_layernorm = nn.Identity()
    return model


def without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments that build a vision encoder without the pooler of its class token, where it can do without."""
    model_class = MODEL_MAPPING.get(type(config), None)
    has_option = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if has_option else {}


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
    input_modalities = ("image",)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput | tuple:
        """Same as [`~LavitVisualTokenizer.encode`]."""
        output = self.encode(pixel_values, generator=generator, keep_mask=keep_mask, **kwargs)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def encode(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        """Encodes images as discrete codes.

        Args:
            pixel_values: Preprocessed images, `[batch, channels, height, width]`.
            generator: Samples which patches to keep (as the original does), from one generator or one per image. By
                default the likelier choice is taken, so that an image always becomes the same tokens.
            keep_mask: Boolean `[batch, num_patches]` that overrides the selector.
            kwargs: For the vision encoder, such as `output_hidden_states`.

        Returns:
            [`LavitVisualTokenizerOutput`] with all fields.

        Raises:
            ValueError: If sizes do not fit the configuration, or pixel values are not finite.
        """
        output = self._tokenize(self.discrete, pixel_values, generator, keep_mask, **kwargs)
        assert self.discrete.quantizer is not None
        output.codes, output.pre_quantized = self.discrete.quantizer(output.features)
        return output

    def embed(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        """Encodes images as continuous features; arguments as for [`~LavitVisualTokenizer.encode`].

        Returns:
            [`LavitVisualTokenizerOutput`] without `codes` and `pre_quantized`.
        """
        branch = self.discrete if self.continuous is None else self.continuous
        return self._tokenize(branch, pixel_values, generator, keep_mask, **kwargs)

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the vision encoder without class or register tokens, `[batch, num_patches, hidden]`."""
        return self._patch_features(self._run_vision_model(pixel_values))

    def _patch_features(self, outputs: BaseModelOutput) -> torch.Tensor:
        num_patches, hidden = self.config.num_patches, outputs.last_hidden_state
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

    def _tokenize(
        self,
        branch: LavitBranch,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        keep_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitVisualTokenizerOutput:
        outputs = self._run_vision_model(pixel_values, **kwargs)
        patch_features = self._patch_features(outputs)
        log_probs = branch.selector(patch_features)
        if keep_mask is None:
            keep_mask = select_patches(log_probs, generator)
        else:
            keep_mask = self._check_keep_mask(keep_mask, log_probs)
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
    ) -> "LavitVisualTokenizer":
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

    keep_mask: torch.Tensor | None = None


@dataclass
class LavitModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model.

    Args:
        image_hidden_states: Projected features of all images, `[total tokens, text hidden]`.
        attention_mask: With one placeholder per patch: the mask of the cached positions, `[batch, past + sequence]`,
            to go on from `past_key_values`. Rows are packed to the right there, without empty placeholders, and
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
            to go on from `past_key_values`. Rows are packed to the right there, without empty placeholders, and
            `attentions` are those of the packed rows. Otherwise `None`.
    """

    image_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


class LavitPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of LaVIT models."""

    config: LavitConfig
    config_class = LavitConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [*LavitVisualTokenizer._no_split_modules, "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """See [`PreTrainedModel.from_pretrained`]; a corrupt file is named in the error."""
        with name_corrupt_weights(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


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
        num_image_tokens: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitImageFeatures:
        """Encodes images for the language model, by the visual tokenizer's continuous branch.

        Args:
            pixel_values: Preprocessed images, `[images, channels, height, width]`.
            image_features: What the visual tokenizer's `embed` gave for them, `[total tokens, vision hidden]`, to
                project only.
            num_image_tokens: With `image_features`: tokens of every image; one image by default.
            kwargs: For the vision encoder, such as `output_hidden_states`.

        Returns:
            [`LavitImageFeatures`], whose `pooler_output` is a list of `[tokens, text hidden]`, one per image.

        Raises:
            ValueError: If not exactly one of `pixel_values` and `image_features` is given.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Pass either pixel_values or image_features.")
        output = LavitImageFeatures()
        if pixel_values is not None:
            tokens = self.visual_tokenizer.embed(pixel_values, **kwargs)
            assert tokens.num_tokens is not None
            image_features, num_image_tokens = tokens.features, tokens.num_tokens.tolist()
            output.last_hidden_state, output.keep_mask = tokens.patch_features, tokens.keep_mask
            output.hidden_states, output.attentions = tokens.hidden_states, tokens.attentions
        assert image_features is not None
        dtype = self.multi_modal_projector.weight.dtype  # that of integers if it is quantized
        projected = self.multi_modal_projector(image_features.to(dtype if dtype.is_floating_point else self.dtype))
        output.pooler_output = list(projected.split(num_image_tokens or [len(projected)]))
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitModelOutputWithPast:
        """
        Args:
            input_ids: Ids of text, visual codes and image placeholders, `[batch, sequence]`.
            pixel_values: Images of the placeholders, in order, `[images, channels, height, width]`.
            image_features: The images as the processor encoded them, `[total tokens, vision hidden]`; instead of
                `pixel_values`.
            attention_mask: Mask of real tokens, `[batch, past + sequence]`, or a 4D mask if no image has empty
                placeholders.
            position_ids: Positions, `[batch, sequence]`; by default they count real tokens.
            past_key_values: Cache of an earlier call.
            inputs_embeds: Embeddings instead of ids, `[batch, sequence, text hidden]`; images must be in them already.
            mm_encoder_outputs: `{"image": output of get_image_features}`, instead of `pixel_values`.
            kwargs: Passed on to the language model.

        Raises:
            ValueError: If ids and embeddings, or placeholders and images, do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        images = self.encode_images(input_ids, pixel_values, image_features, mm_encoder_outputs)
        is_empty = image_hidden_states = None
        if input_ids is not None:
            inputs_embeds, image_hidden_states, is_empty = self._embed(input_ids, images)
        assert inputs_embeds is not None
        batch_size, new_positions = inputs_embeds.shape[:2]
        source = None
        if is_empty is not None:
            self._check_free_positions(position_ids)
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            attention_mask = full_mask(attention_mask, is_empty, past)
            order, packed_mask, source = pack_rows(is_empty, attention_mask[:, -new_positions:])
            if past_key_values is None and kwargs.get("use_cache") is False:
                # Without a cache nobody counts positions: what is padding in all rows, most placeholders, can go.
                order, packed_mask, source = trim_rows(order, packed_mask, source)
            inputs_embeds = gather_positions(inputs_embeds, order)
            attention_mask = torch.cat([attention_mask[:, :-new_positions], packed_mask], dim=1)
        attention_mask = apply_remembered_mask(attention_mask, past_key_values, batch_size, new_positions)
        is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if position_ids is None and is_2d:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -inputs_embeds.shape[1] :]

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if is_empty is not None and attention_mask is not None and outputs.past_key_values is not None:
            remember_mask(outputs.past_key_values, attention_mask)
        return LavitModelOutputWithPast(
            last_hidden_state=_unpack(outputs.last_hidden_state, source),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states and tuple(_unpack(state, source) for state in outputs.hidden_states),
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            attention_mask=attention_mask if is_empty is not None else None,
        )

    def _embed(
        self, input_ids: torch.Tensor, images: BaseModelOutputWithPooling | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Embeds ids and puts images in place of their placeholders.

        Returns:
            Embeddings `[batch, sequence, text hidden]`, the images in them `[total tokens, text hidden]`, and a mask
            `[batch, sequence]` of placeholders without a token; the last two are `None` where there are none.
        """
        is_placeholder = torch.eq(input_ids, self.config.image_token_id)
        # Placeholders lie outside the embedding table.
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if images is None:
            self._check_no_placeholders(is_placeholder)
            return inputs_embeds, None, None
        num_tokens = [len(tokens) for tokens in images.pooler_output]
        num_patches = self.config.visual_tokenizer_config.num_patches
        is_empty = find_empty_placeholders(is_placeholder, num_tokens, num_patches)
        empty = inputs_embeds.new_empty(0, inputs_embeds.shape[-1])  # Perhaps no image has a token.
        image_hidden_states = torch.cat([empty, *(tokens.to(empty) for tokens in images.pooler_output)])
        is_filled = is_placeholder if is_empty is None else is_placeholder & ~is_empty
        inputs_embeds = inputs_embeds.masked_scatter(is_filled[..., None], image_hidden_states)
        return inputs_embeds, image_hidden_states, is_empty

    def encode_images(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> BaseModelOutputWithPooling | None:
        """Brings images into one form, whichever of the three they are passed in.

        Args:
            input_ids: Prompts with the placeholders of the images, `[batch, sequence]`.
            pixel_values: See `forward`.
            image_features: See `forward`.
            mm_encoder_outputs: See `forward`.

        Returns:
            The output of `get_image_features`, or `None` if there are no images.

        Raises:
            ValueError: If images are passed twice, or without ids that show where they go.
        """
        encoded = (mm_encoder_outputs or {}).get("image")
        given = [images for images in (pixel_values, image_features, encoded) if images is not None]
        if len(given) > 1:
            raise ValueError("Pass images once: as pixel_values, image_features or mm_encoder_outputs.")
        if given and input_ids is None:
            raise ValueError("Images need input_ids: embeddings do not show where the images go.")
        if not given or encoded is not None:
            return encoded
        if pixel_values is not None:
            return self.get_image_features(pixel_values=pixel_values, return_dict=True)
        assert input_ids is not None and image_features is not None
        is_placeholder = torch.eq(input_ids, self.config.image_token_id)
        num_image_tokens = split_image_features(is_placeholder, image_features)
        return self.get_image_features(
            image_features=image_features, num_image_tokens=num_image_tokens, return_dict=True
        )

    @staticmethod
    def _check_free_positions(position_ids: torch.Tensor | None) -> None:
        if position_ids is not None:
            raise ValueError(
                "position_ids cannot be given when images have one placeholder per patch, because which of them "
                "count is known only after encoding. Leave position_ids out, or attach the visual tokenizer to the "
                "processor."
            )

    @staticmethod
    def _check_no_placeholders(is_placeholder: torch.Tensor) -> None:
        # Decoding steps and compiled graphs are spared the look at the data.
        if is_placeholder.shape[1] > 1 and not torch.compiler.is_compiling() and is_placeholder.any():
            raise ValueError(
                "The prompt holds image placeholders but no images were given. Pass what the processor returned: "
                "pixel_values or image_features."
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

    output_modalities = ("text", "image")
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

        The language model's vocabulary is extended by image start, image end and one row per code. Text stays as it
        was: the new model's logits of text are the language model's own.

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
                which are taken over, not copied. `dtype` is for the whole model, by default the language model's. All
                others are for [`LavitConfig.from_vision_text_configs`], such as `codebook_size`.

        Raises:
            TypeError: If an argument is unknown or no model.
            ValueError: If the models cannot become a LaVIT.
        """
        from .modeling_lavit import build_lavit, load_language_model, load_visual_part, take_prefixed

        vision_kwargs, text_kwargs = take_prefixed(kwargs, "vision_"), take_prefixed(kwargs, "text_")
        if "dtype" in kwargs:
            text_kwargs.setdefault("dtype", kwargs.pop("dtype"))
        language_model = load_language_model(text_model_name_or_path, **text_kwargs)
        vision_kwargs.setdefault("dtype", language_model.dtype)
        visual_part = load_visual_part(vision_model_name_or_path, visual_tokenizer, **vision_kwargs)
        config = LavitConfig.from_vision_text_configs(visual_part.config, language_model.config, **kwargs)
        return build_lavit(cls, config, visual_part, language_model, mean_resizing)

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
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        vocab_slice: tuple[int, int] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavitCausalLMOutputWithPast:
        """Predicts the next ids. Arguments not listed here are those of [`LavitModel`].

        Args:
            labels: Ids to predict, `[batch, sequence]`, unshifted; -100 and image placeholders are ignored.
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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._compute_logits(outputs.last_hidden_state[:, kept], vocab_slice)
        logits = scale_logits(logits, self.config.text_config)
        loss = None
        if labels is not None:
            labels = self._ignore_placeholders(labels, kwargs.get("num_items_in_batch"))
            labels = self._ignore_after_padding(labels, attention_mask)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LavitCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            attention_mask=outputs.attention_mask,
        )

    def _compute_logits(self, hidden: torch.Tensor, vocab_slice: tuple[int, int] | None) -> torch.Tensor:
        if vocab_slice is None:
            return self.lm_head(hidden)
        # Only a plain head has rows to pick: quantized, adapted or offloaded ones compute all logits.
        is_plain = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) is nn.Parameter
        if is_plain and not hasattr(self.lm_head, "_hf_hook"):
            bias = None if self.lm_head.bias is None else self.lm_head.bias[slice(*vocab_slice)]
            return split_linear(hidden, self.lm_head.weight[slice(*vocab_slice)], bias)
        return self.lm_head(hidden)[..., slice(*vocab_slice)]

    def _ignore_placeholders(self, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        is_placeholder = torch.eq(labels, self.config.image_token_id)
        if num_items_in_batch is not None and not torch.compiler.is_compiling() and is_placeholder.any():
            logger.warning_once(
                "The labels hold image placeholders. They are ignored, but whoever counted num_items_in_batch (as "
                "Trainer does) took them for tokens to learn, which makes the loss too small. Set them to -100."
            )
        return labels.masked_fill(is_placeholder, -100)

    @staticmethod
    def _ignore_after_padding(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The first token after padding on the left has nothing real before it that could predict it."""
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return labels
        before = attention_mask[:, -labels.shape[1] : -1]
        return labels.masked_fill(nn.functional.pad(before == 0, (labels.shape[1] - before.shape[1], 0)), -100)


_COMMON_FIELDS = {field.name for field in fields(PreTrainedConfig)}


_VISUAL_FIELDS = {field.name for field in fields(LavitVisualTokenizerConfig)} - _COMMON_FIELDS - {"vision_config"}


_JOINT_FIELDS = {"tie_word_embeddings", "dtype"}


def join_configs(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **kwargs: Any
) -> dict[str, PreTrainedConfig | Any]:
    """Arguments of the [`LavitConfig`] of a new LaVIT.

    Args:
        vision_config: A vision encoder's; that of a model that has one (CLIP, SigLIP, BLIP-2, ...); or that of a
            trained visual tokenizer, alone or in a whole LaVIT.
        text_config: A language model's, whose vocabulary does not count the visual ids yet.
        kwargs: Fields of [`LavitVisualTokenizerConfig`] and [`LavitConfig`].

    Raises:
        TypeError: If an argument is none of these fields.
        ValueError: If the models cannot become a LaVIT.
    """
    visual = {name: kwargs.pop(name) for name in list(kwargs) if name in _VISUAL_FIELDS}
    if unknown := sorted(set(kwargs) - _JOINT_FIELDS):
        known = ", ".join(sorted(_VISUAL_FIELDS | _JOINT_FIELDS))
        raise TypeError(f"No configuration value of a new LaVIT: {', '.join(unknown)}. There are {known}.")
    visual_config = build_visual_config(vision_config, **visual)
    language_model = build_on_meta(text_config)
    check_language_model(language_model)
    text = text_config.to_dict()
    first_visual_id = text["vocab_size"]
    text["vocab_size"] = first_visual_id + 2 + visual_config.codebook_size
    return {
        "text_config": text,
        "visual_tokenizer_config": visual_config.to_dict(),
        "boi_token_id": first_visual_id,
        "lm_head_bias": language_model.get_output_embeddings().bias is not None,
        **kwargs,
    }


def build_visual_config(vision_config: PreTrainedConfig, **kwargs: Any) -> LavitVisualTokenizerConfig:
    """The configuration of a visual tokenizer around a vision encoder, or that of a trained one.

    A new one has the published depth and codebook, heads and MLPs as wide as the encoder's own, and exact attention
    (`attention_smoothing=0`: what is trained anew needs no smoothing, and skips dropped patches).

    Args:
        vision_config: See [`join_configs`].
        kwargs: Fields of [`LavitVisualTokenizerConfig`]. Of a trained visual tokenizer only `share_branches` can be
            chosen: it is what weights do not decide.

    Raises:
        ValueError: If the encoder gives no features per patch, or a field belongs to the trained visual tokenizer.
    """
    found = find_visual_config(vision_config)
    if isinstance(found, LavitVisualTokenizerConfig):
        if fixed := sorted(set(kwargs) - {"share_branches"}):
            raise ValueError(f"The trained visual tokenizer has its own {', '.join(fixed)}; leave them out.")
        # Stage 2 trains the continuous branch; codes must not change meanwhile.
        return LavitVisualTokenizerConfig(**{**found.to_dict(), "share_branches": False, **kwargs})
    check_vision_model(found)
    hidden_size = found.hidden_size
    defaults = {
        "merger_num_heads": getattr(found, "num_attention_heads", None),
        "merger_intermediate_size": getattr(found, "intermediate_size", None)
        or int(hidden_size * getattr(found, "mlp_ratio", 4)),
        "attention_smoothing": 0,
    }
    defaults = {name: value for name, value in defaults.items() if value is not None}
    vision = found.to_dict()
    if found.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False  # SigLIP's pooling of patches, which LaVIT does not use.
    return LavitVisualTokenizerConfig(vision_config=vision, **{**defaults, **kwargs})


def find_visual_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the visual tokenizer in `config`, or else that of the vision encoder."""
    if isinstance(config, LavitVisualTokenizerConfig):
        return config
    for name in ("visual_tokenizer_config", "vision_config"):
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            return part
    return config


def check_vision_model(config: PreTrainedConfig) -> None:
    """Checks that a vision encoder gives a feature for each of its patches, by running it on the meta device.

    Raises:
        ValueError: If it does not.
    """
    name = type(config).__name__
    lacking = [key for key in ("hidden_size", "image_size", "patch_size") if not getattr(config, key, None)]
    if lacking:
        raise ValueError(
            f"{name} has no {', '.join(lacking)}: LaVIT needs a plain vision transformer (ViT, CLIP, SigLIP, DINOv2, "
            "BLIP-2, ...) that gives one feature for each patch, no convolutional or hierarchical network."
        )
    trial = LavitVisualTokenizerConfig(vision_config=config.to_dict(), merger_num_heads=1, merger_num_layers=0)
    pixel_values = torch.empty(1, getattr(config, "num_channels", 3), *trial.image_size, device="meta")
    try:
        with torch.device("meta"), init.no_init_weights(), torch.no_grad():
            outputs = build_vision_model(trial.vision_config).eval()(pixel_values=pixel_values, return_dict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The vision model of {name} cannot be run on pixel values alone: {error}") from error
    shape = list(outputs.last_hidden_state.shape)
    if len(shape) != 3 or shape[1] < trial.num_patches or shape[2] != config.hidden_size:
        raise ValueError(
            f"The vision model of {name} gives features of shape {shape}, but LaVIT needs {config.hidden_size} values "
            f"for each of the {trial.num_patches} patches. Use a plain vision transformer."
        )


def build_on_meta(text_config: PreTrainedConfig) -> PreTrainedModel:
    """A language model without weights.

    Raises:
        ValueError: If the configuration is not that of a decoder.
    """
    name = type(text_config).__name__
    if getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model: LaVIT needs a decoder (Llama, GPT-2, Qwen2, ...).")
    if text_config.get_text_config() is not text_config:
        raise ValueError(
            f"{name} is a multimodal model. Pass its language model alone: its text_config, or a checkpoint that "
            "holds nothing else."
        )
    is_known = type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known and "AutoModelForCausalLM" not in (getattr(text_config, "auto_map", None) or {}):
        raise ValueError(f"{name} belongs to no language model that generates text (AutoModelForCausalLM).")
    with torch.device("meta"), init.no_init_weights():
        return AutoModelForCausalLM.from_config(text_config)


def check_language_model(model: PreTrainedModel) -> None:
    """Checks that a language model is a causal decoder with nothing but a linear head on top.

    Raises:
        ValueError: If it is not.
    """
    name, decoder = type(model).__name__, model.base_model
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise ValueError(f"{name} is an encoder, its tokens see those after them: LaVIT needs a decoder (Llama, ...).")
    accepted = inspect.signature(decoder.forward).parameters
    if decoder is model or not {"inputs_embeds", "past_key_values"} <= accepted.keys():
        raise ValueError(f"{type(decoder).__name__} takes no inputs_embeds or no past_key_values, which LaVIT needs.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The head of {name} is no linear layer but {type(head).__name__}.")
    inside = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    if outside := [key for key, parameter in model.named_parameters() if id(parameter) not in inside]:
        raise ValueError(
            f"{name} has more than a decoder and a linear head ({', '.join(outside[:3])}, ...); LaVIT would lose it."
        )


def resize_vision_model(model: PreTrainedModel, image_size: int | tuple[int, int]) -> PreTrainedModel:
    """Returns the encoder for images of another size; its learned positions are interpolated as a picture is resized.

    Encoders with rotary positions have nothing to interpolate.

    Args:
        model: A plain vision transformer with one learned position per patch, after those of class and register
            tokens if these have any.
        image_size: Height and width of the images, in pixels.

    Raises:
        ValueError: If a weight other than a table of positions depends on the image size.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    if _grid(config) == _grid(model.config):
        return model
    arguments: dict[str, Any] = without_pooler(config)
    with torch.device("meta"), init.no_init_weights():
        resized = type(model)(config, **arguments)
    weights = model.state_dict()
    for name, expected in resized.state_dict().items():
        if expected.shape != weights[name].shape:
            weights[name] = _interpolate(name, weights[name], _grid(model.config), config)
            if expected.shape != weights[name].shape:
                raise ValueError(f"{name} of {type(model).__name__} cannot be interpolated to {image_size} pixels.")
    resized.load_state_dict(weights, strict=False, assign=True)
    return resized.eval()


def _grid(config: Any) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = _as_pair(config.image_size), _as_pair(config.patch_size)
    return height // patch_height, width // patch_width


def _interpolate(name: str, table: torch.Tensor, old: tuple[int, int], config: Any) -> torch.Tensor:
    """`[..., extra + old patches, width]` -> `[..., extra + new patches, width]`."""
    num_extra = table.shape[-2] - old[0] * old[1] if table.ndim >= 2 else -1
    if "position" not in name or num_extra < 0:
        raise ValueError(f"{name} depends on the image size, and is no table of positions that could be interpolated.")
    rows = table.reshape(-1, table.shape[-1])
    picture = rows[num_extra:].float().unflatten(0, old).movedim(-1, 0)[None]
    antialias = config.model_type == "dinov2_with_registers"  # as this one, alone, does by itself
    picture = F.interpolate(picture, _grid(config), mode="bicubic", align_corners=False, antialias=antialias)
    patches = picture[0].movedim(0, -1).flatten(0, 1).to(table.dtype)
    return torch.cat([rows[:num_extra], patches]).reshape(*table.shape[:-2], -1, table.shape[-1])


Source = str | os.PathLike | None


_TOLERANCE = 0.05  # relative; half precision rounds differently from one code path to another


def take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Removes arguments such as `text_revision` from `kwargs`, and returns them without their prefix."""
    names = [name for name in kwargs if name.startswith(prefix)]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}


def load_language_model(source: Source, **kwargs: Any) -> PreTrainedModel:
    """The language model to build on, checked.

    Args:
        source: Directory or Hub id.
        kwargs: For `AutoModelForCausalLM.from_pretrained`; or `model`, one that is loaded already.

    Raises:
        TypeError: If `model` is none.
        ValueError: If it is no decoder, or there is no language model given.
    """
    model = kwargs.pop("model", None)
    if model is None:
        if source is None:
            raise ValueError("Pass the language model: a directory or Hub id, or `text_model`.")
        config = kwargs.pop("config", None)
        config = _load_config(source, kwargs) if config is None else config
        build_on_meta(config)  # a clear error before gigabytes are read
        model = AutoModelForCausalLM.from_pretrained(source, config=config, **kwargs)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(
            f"text_model must be a language model with a head (AutoModelForCausalLM), got {type(model).__name__}."
        )
    check_language_model(model)
    return model


def load_visual_part(source: Source, visual_tokenizer: Source | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A trained visual tokenizer, or a vision encoder to build a new one around.

    Args:
        source: Directory or Hub id of a vision encoder, of a model that has one, or of a visual tokenizer.
        visual_tokenizer: A trained visual tokenizer (or a model that has one), or its directory or Hub id.
        kwargs: For `from_pretrained`; or `model`, one that is loaded already.

    Raises:
        TypeError: If an object is no model.
        ValueError: If both or none are given, the encoder does not suit, or its checkpoint lacks weights.
    """
    model = kwargs.pop("model", None)
    if sum(given is not None for given in (source, visual_tokenizer, model)) != 1:
        raise ValueError("Pass exactly one of: a vision model's directory or Hub id, vision_model, visual_tokenizer.")
    if visual_tokenizer is not None and not isinstance(visual_tokenizer, (str, os.PathLike)):
        model = visual_tokenizer
    if model is not None:
        part = _find_visual_module(model)
        if visual_tokenizer is not None and not isinstance(part, LavitVisualTokenizer):
            raise TypeError(f"{type(visual_tokenizer).__name__} is and has no LavitVisualTokenizer.")
        return part
    path = source if visual_tokenizer is None else visual_tokenizer
    if _holds_visual_tokenizer(path, kwargs):
        return LavitVisualTokenizer.from_pretrained(path, **kwargs)
    if visual_tokenizer is not None:
        raise ValueError(f"{path} holds no LavitVisualTokenizer. Pass a bare vision encoder as the first argument.")
    config = find_visual_config(kwargs.pop("config", None) or _load_config(path, kwargs))
    check_vision_model(config)
    return _load_vision_model(path, config, kwargs)


def build_lavit(
    model_class: type[PreTrainedModel],
    config: LavitConfig,
    visual_part: PreTrainedModel,
    language_model: PreTrainedModel,
    mean_resizing: bool,
) -> Any:
    """Builds the model. The parts are taken over, not copied: its weights are theirs.

    Args:
        model_class: [`LavitForConditionalGeneration`].
        config: Its configuration.
        visual_part: See [`load_visual_part`].
        language_model: See [`load_language_model`]; its embeddings grow.
        mean_resizing: See `resize_token_embeddings`.

    Raises:
        ValueError: If weights do not fit, or the language model's logits cannot be reproduced.
    """
    language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=mean_resizing)
    state_dict = _visual_weights(visual_part, config.visual_tokenizer_config.share_branches)
    state_dict |= _text_weights(language_model, config.tie_word_embeddings)
    dtype = language_model.get_input_embeddings().weight.dtype
    # What is missing here is new, and gets its initialization from the classes.
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    new = ("model.multi_modal_projector.", "model.visual_tokenizer.discrete.", "model.visual_tokenizer.continuous.")
    wrong = [name for name in info["missing_keys"] if not name.startswith(new)]
    # Of the vision encoder, LaVIT leaves the layers after its features.
    unused = "model.visual_tokenizer.vision_model."
    wrong += [name for name in info["unexpected_keys"] if not name.startswith(unused)]
    wrong += map(str, info["mismatched_keys"])
    if wrong:
        raise ValueError(f"The weights of these models do not fit together as a LaVIT: {', '.join(wrong[:5])}.")
    _keep_in_fp32(model)
    model.name_or_path = model.config.name_or_path = ""
    model.generation_config = _generation_ids(language_model)
    _check_logits(model, language_model)
    if info["missing_keys"]:
        parts = [part for part in new if any(name.startswith(part) for name in info["missing_keys"])]
        logger.warning(
            "Newly initialized, and of no use before they are trained: the embeddings of visual ids, "
            f"{', '.join(part.removeprefix('model.').rstrip('.') for part in parts)}."
        )
    return model


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Does for new weights what `from_pretrained` does for loaded ones."""
    for name, parameter in model.named_parameters():
        if not model._keep_in_fp32_modules_strict.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()


def _load_config(source: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    names = (*_HUB_KWARGS, "trust_remote_code")
    return AutoConfig.from_pretrained(source, **{name: kwargs[name] for name in names if name in kwargs})


def _holds_visual_tokenizer(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint is that of a visual tokenizer or of any model with one, those of stage 1 included."""
    located = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(source, **located)
    key = LavitVisualTokenizerConfig.base_config_key
    return key in values or values.get("model_type") == LavitVisualTokenizerConfig.model_type


def _find_visual_module(model: Any) -> PreTrainedModel:
    """The visual tokenizer of a model, or else its vision encoder."""
    if isinstance(model, LavitVisualTokenizer):
        return model
    for name in ("visual_tokenizer", "vision_model"):
        if isinstance(part := getattr(model, name, None), PreTrainedModel):
            return part
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Expected a vision model or a visual tokenizer, got {type(model).__name__}.")
    return model


def _load_vision_model(source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    loader: Any = AutoModel
    image_size = kwargs.pop("image_size", config.image_size)
    if config.model_type == "blip_2_vision_model":
        from transformers import Blip2VisionModel

        # transformers finds the encoder in checkpoints of CLIP and SigLIP by itself, but not in those of BLIP-2.
        loader, kwargs = Blip2VisionModel, {"key_mapping": {r"^vision_model\.": ""}, **kwargs}
    elif config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    model, info = loader.from_pretrained(
        source, config=config, output_loading_info=True, **without_pooler(config), **kwargs
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights of its vision encoder: {', '.join(sorted(info['missing_keys'])[:5])}."
        )
    return resize_vision_model(model, image_size)


def _visual_weights(part: PreTrainedModel, share_branches: bool) -> dict[str, torch.Tensor]:
    prefix = "model.visual_tokenizer."
    if not isinstance(part, LavitVisualTokenizer):
        prefix += "vision_model."
        return {prefix + name: tensor for name, tensor in part.state_dict().items()}
    weights = part.state_dict()
    if share_branches:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("continuous.")}
    elif part.continuous is None:
        # Stage 2 goes on from what stage 1 has learned.
        shared = {name: tensor for name, tensor in weights.items() if name.startswith("discrete.")}
        shared = {name: tensor for name, tensor in shared.items() if not name.startswith("discrete.quantizer.")}
        weights |= {name.replace("discrete.", "continuous.", 1): tensor.clone() for name, tensor in shared.items()}
    return {prefix + name: tensor for name, tensor in weights.items()}


def _text_weights(model: PreTrainedModel, is_tied: bool) -> dict[str, torch.Tensor]:
    weights = {f"model.language_model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    head = model.get_output_embeddings().state_dict()
    if is_tied:
        del head["weight"]
    return weights | {f"lm_head.{name}": tensor for name, tensor in head.items()}


def _generation_ids(model: PreTrainedModel) -> GenerationConfig:
    """The special ids for generation; sampling options of the language model alone do not carry over."""
    stored = model.generation_config
    ids = {name: getattr(stored, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: getattr(model.config, name, None) if value is None else value for name, value in ids.items()}
    eos = ids["eos_token_id"]
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(**ids)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, language_model: PreTrainedModel) -> None:
    """Some language models scale embeddings or logits in ways of their own: better an error than wrong numbers."""
    ids = torch.arange(2, device=model.device)[None]
    modes = [part.training for part in (model, language_model)]
    expected = language_model.eval()(input_ids=ids).logits.float()
    actual = model.eval()(input_ids=ids).logits.float()
    for part, mode in zip((model, language_model), modes, strict=True):
        part.train(mode)
    if not (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max():  # which NaN is not, either
        raise ValueError(
            f"LaVIT's logits are not those of {type(language_model).__name__}: it does something to its embeddings or "
            "logits that LaVIT does not know. Use another language model."
        )
