"""LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) with PEFT: what to adapt in a LaVIT, and adapters that were
saved: loading them into their base, and writing a checkpoint of both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import ModelCardData, snapshot_download
from torch import nn
from transformers.utils.peft_utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    find_adapter_config_file,
)

from ...conversion.model_card import copy_notices_of, describe_source, save_derived_card
from ...conversion.weight_files import (
    Weights,
    check_destination,
    check_shard_size,
    complete_directory,
    find_weights,
    read_json,
)
from ...modeling.checkpoint_files import load_complete
from ...modeling.modeling_lavit import LavitForConditionalGeneration
from ...pipelines.pixel_decoder_files import copy_pixel_decoders, link_pixel_decoders
from ...processing.processing_lavit import ImageTextProcessor
from ...utils.atomic_files import write_json
from ...utils.json_files import read_json_object
from ...utils.paths import resolve_inside
from ...utils.safetensors_files import read_headers

if TYPE_CHECKING:
    from peft import LoraConfig


def get_lora_config(model: LavitForConditionalGeneration | None = None, **kwargs: Any) -> LoraConfig:
    """The `LoraConfig` of a LaVIT, for `peft.get_peft_model`.

    Adapts every linear layer of the language model and the projection of images. The visual tokenizer stays as it is:
    an adapted one would give other codes than the language model has learned. Embeddings and head are trained whole,
    because visual ids that nothing has trained yet cannot be reached through adapters; where they have been trained,
    as in published checkpoints, `modules_to_save=None` saves most of the memory.

    Args:
        model: The model to adapt. Only its names are looked at: not every language model calls its embeddings
            `embed_tokens`, and tied embeddings have to stay tied. Without it names are those of Llama, untied.
        kwargs: Values of `LoraConfig` that replace those of this function.

    Returns:
        The configuration, with rank 16 and scale 2 (`lora_alpha=32`).
    """
    from peft import LoraConfig, TaskType

    values: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "exclude_modules": r".*visual_tokenizer.*",
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": TaskType.CAUSAL_LM,
    }
    if model is not None:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        values["modules_to_save"] = [_last_name(model, module) for module in modules]
    values.update(kwargs)
    if model is not None and model.config.tie_word_embeddings and values["modules_to_save"]:
        values.setdefault("ensure_weight_tying", True)
    return LoraConfig(**values)


def upcast_trained_weights(model: nn.Module) -> None:
    """Brings what is trained to fp32, for training with mixed precision on a base model in half precision.

    PEFT does so for adapters, but not for the copies of embeddings and head, in which bfloat16 would round away most
    steps of usual learning rates.

    Args:
        model: What `get_peft_model` returned.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _last_name(model: nn.Module, module: nn.Module | None) -> str:
    return next(name for name, other in model.named_modules() if other is module).rpartition(".")[-1]


_PROCESSOR = "processor_config.json"


_ADAPTER_CARD = """---
{metadata}
---

# Adapters of LoRA for a LaVIT

They were trained on {origin} with `examples/finetune_lora.py` of lavit-hf, and are of use only together with it.
`lavit caption`, `ask`, `draw` and the other commands take this directory as `--model`; `lavit merge` makes one
checkpoint of both. In Python:

```python
from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from peft import PeftModel

path = "path/to/this/directory"
base = LavitForConditionalGeneration.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, path).merge_and_unload()
processor = ImageTextProcessor.from_pretrained(path, visual_tokenizer=model.visual_tokenizer)
```
"""


class Adapter(NamedTuple):
    """Adapters, and what they adapt.

    Attributes:
        folder: Their directory, or the local copy of their repository.
        base: Directory or repository of the LaVIT that they were trained on.
    """

    folder: Path
    base: str

    @property
    def processor(self) -> str:
        """Where the processor is: beside the adapters, or with their base."""
        return str(self.folder) if (self.folder / _PROCESSOR).is_file() else self.base

    @property
    def touches_visual_tokenizer(self) -> bool:
        """Whether more than the language model is adapted."""
        return any(".visual_tokenizer." in name for name in read_headers(self.folder / ADAPTER_SAFE_WEIGHTS_NAME))


def read_adapter_config(folder: Path, error: type[Exception] = ValueError) -> dict[str, Any]:
    """Reads the configuration of adapters of any kind that PEFT knows.

    Args:
        folder: Their directory.
        error: What to raise.

    Raises:
        Exception: `error`, if it cannot be used.
    """
    path = folder / ADAPTER_CONFIG_NAME
    config = read_json_object(path, error)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if not isinstance(kind, str) or not isinstance(base, (str, type(None))):
        raise error(f"{path} is no configuration of PEFT: peft_type or base_model_name_or_path is no text.")
    if config.get("megatron_config"):  # peft would import whatever module it names
        raise error(f"{path} is of a model of Megatron, not of a LaVIT.")
    return config


def find_adapter(source: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Adapter | None:
    """Finds adapters and their base.

    Args:
        source: A directory, or the id of a repository.
        base: The LaVIT that they were trained on; by default what their configuration says.

    Returns:
        Both; `None` if `source` holds no adapters.

    Raises:
        ValueError: The adapters are not of LoRA or not complete, or their base is not there.
    """
    path = find_adapter_config_file(os.fspath(source))
    if path is None:
        return None
    folder = Path(path).parent
    if not os.path.isdir(source):
        folder = Path(snapshot_download(os.fspath(source), allow_patterns=["adapter_*", "*.json", "*.jinja"]))
    config = read_adapter_config(folder)
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG_NAME} is not of LoRA, but of {config['peft_type']!r}.")
    if not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{source} has no {ADAPTER_SAFE_WEIGHTS_NAME}: adapters are read from safetensors only.")
    read_headers(folder / ADAPTER_SAFE_WEIGHTS_NAME, ValueError)
    found = os.fspath(base) if base is not None else config.get("base_model_name_or_path")
    if not found:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_NAME} names no base model; name it: lavit merge {source} OUT --base DIR"
        )
    _check_base(source, found)
    return Adapter(folder, found)


def apply_adapter(model: LavitForConditionalGeneration, adapter: Adapter) -> LavitForConditionalGeneration:
    """Merges adapters into their base.

    Args:
        model: The base, loaded; it is changed.
        adapter: The adapters.

    Returns:
        The model, every weight in the dtype that it had.

    Raises:
        ImportError: peft is not installed.
        ValueError: The adapters do not fit the base, or are not finite.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("Adapters need the package `peft`: pip install 'lavit-hf[training]'") from error
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter.folder), torch_device=str(model.device))
        stored = set(read_headers(adapter.folder / ADAPTER_SAFE_WEIGHTS_NAME))
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        _check_names(expected - stored, "lacks")
        _check_names(stored - expected - adapted.state_dict().keys(), "has")
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{adapter.folder} does not fit {adapter.base}: {' '.join(lines[:2])}") from error
    for name, parameter in merged.named_parameters():  # peft trains and stores whole copies in fp32
        parameter.data = parameter.data.to(dtypes[name])
    merged.tie_weights()
    return merged


def merge_adapter(
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a checkpoint of adapters and their base: weights, processor, pixel decoders, licenses.

    Args:
        adapter: Directory or repository of the adapters.
        destination: Directory to create. It appears only when it is complete.
        base: As in [`find_adapter`].
        max_shard_size: Largest size of a file of weights.

    Returns:
        The created directory.

    Raises:
        ConversionError: The destination cannot be written.
        ImportError: peft is not installed.
        ValueError: There are no adapters, they do not fit the base, this is not there, or files of either are links
            that lead out of it.
    """
    target = Path(destination)
    check_destination(target)
    check_shard_size(max_shard_size)
    found = find_adapter(adapter, base)
    if found is None:
        raise ValueError(f"{adapter} holds no adapters of LoRA: it has no {ADAPTER_CONFIG_NAME}.")
    for root in (found.folder, Path(found.base)):  # what the processor is saved from
        for path in (*root.glob("*.json"), *root.glob("*.jinja")):
            resolve_inside(root, path.name, str(root))
    model = apply_adapter(load_complete(LavitForConditionalGeneration, found.base), found)
    processor = ImageTextProcessor.from_pretrained(found.processor)
    with complete_directory(target) as folder:
        _save_as_stored(model, Path(found.base), folder, max_shard_size)
        processor.save_pretrained(folder)
        if copy_pixel_decoders(found.base, folder):
            link_pixel_decoders(folder)
        copy_notices_of(found.base, folder)
        origin = f"It was made with `lavit merge`, of {describe_source(found.base)} and adapters of LoRA."
        save_derived_card(folder, origin, [found.base])
    return target


def save_adapter_card(folder: str | os.PathLike[str], base: str) -> None:
    """Replaces the card that peft writes beside adapters, which is a form to fill in and names local paths.

    Args:
        folder: Directory of the adapters.
        base: Directory or repository of the LaVIT that they were trained on.
    """
    is_path = os.path.isdir(base)
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag="image-text-to-text",
        base_model=None if is_path else base,
        tags=["lavit", "lora", "visual-tokenizer"],
    )
    place = "path/to/its/directory" if is_path else base
    card = _ADAPTER_CARD.format(metadata=metadata.to_yaml(), origin=describe_source(base), base=place)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def _save_as_stored(model: LavitForConditionalGeneration, base: Path, folder: Path, max_shard_size: int | str) -> None:
    """Saves a model with every weight in the dtype that its base's files have, which may not be that of loading."""
    if base.is_dir():
        stored = Weights(find_weights(base, "model"))
        for name, parameter in model.named_parameters():
            if name in stored.headers:
                parameter.data = parameter.data.to(stored.dtype(name))
    loads_as = model.config.dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    path = folder / "config.json"
    config = read_json(path)
    config["dtype"] = str(loads_as).removeprefix("torch.")
    write_json(path, config, sort_keys=True)


def _check_base(source: str | os.PathLike[str], base: str) -> None:
    hint = f"name it: lavit merge {source} OUT --base DIR"
    if not os.path.exists(base):
        if base.count("/") == 1 and not base.startswith((".", "/", "~")):
            return  # a repository
        raise ValueError(f"{source} holds adapters of {base}, which does not exist here; {hint}")
    if (Path(base) / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{base}, the base of {source}, holds adapters itself; merge these first.")
    try:
        model_type = read_json_object(Path(base) / "config.json").get("model_type")
    except OSError:
        model_type = None
    if model_type != "lavit":
        raise ValueError(f"{source} holds adapters of {base}, which is no LaVIT checkpoint; {hint}")


def _check_names(names: set[str], problem: str) -> None:
    if names:
        raise ValueError(f"it {problem} {len(names)} tensors, the first is {min(names)}.")


__all__ = [
    "Adapter",
    "apply_adapter",
    "find_adapter",
    "get_lora_config",
    "merge_adapter",
    "read_adapter_config",
    "save_adapter_card",
    "upcast_trained_weights",
]
