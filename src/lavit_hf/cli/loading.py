"""Loads model and processor for the command line, with errors that name what is wrong."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import AutoProcessor
from transformers.utils import logging

from .. import ImageTextProcessor, LavitForConditionalGeneration, LavitVisualTokenizer

RANDOM_WEIGHTS_TAG = "random-weights"

# Below this size a progress bar would be gone before anyone read it.
_BAR_BYTES = 500_000_000


@dataclass
class Lavit:
    """What a command needs.

    Attributes:
        model: On its device, ready to generate.
        processor: With the model's visual tokenizer attached.
        random_weights: Whether the checkpoint's card says that its weights are random.
    """

    model: LavitForConditionalGeneration
    processor: ImageTextProcessor
    random_weights: bool


def load(model: str, device: str = "auto", dtype: str = "auto") -> Lavit:
    """Loads a checkpoint.

    Args:
        model: Directory, or name on the Hub.
        device: `"auto"` is the first CUDA device, or the CPU if there is none.
        dtype: `"auto"` is float32 on a CPU, where half precision can be 100 times slower, and as stored elsewhere.

    Returns:
        Model and processor.

    Raises:
        ValueError: The checkpoint or the device cannot be used.
    """
    target, dtype = _prepare(model, device, dtype)
    try:
        loaded, report = LavitForConditionalGeneration.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{model}: the weights are corrupt ({error}).") from error
    except RuntimeError as error:
        raise ValueError(f"{model}: the weights do not fit the configuration ({error}).") from error
    except OSError as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers.
        raise ValueError(f"{model}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    loaded = loaded.to(target).eval()
    return Lavit(loaded, _load_processor(model, loaded.visual_tokenizer), _has_random_weights(model))


def load_processor(model: str, device: str = "auto", dtype: str = "auto") -> ImageTextProcessor:
    """Loads a checkpoint's processor and visual tokenizer, and nothing of its language model.

    Args:
        model: Directory, or name on the Hub.
        device: As for `load`.
        dtype: As for `load`.

    Returns:
        The processor, with the visual tokenizer attached.

    Raises:
        OSError: The weights are missing or corrupt.
        ValueError: The checkpoint or the device cannot be used.
    """
    target, dtype = _prepare(model, device, dtype)
    try:
        visual_tokenizer = LavitVisualTokenizer.from_pretrained(model, dtype=dtype)
    except RuntimeError as error:
        raise ValueError(f"{model}: the weights do not fit the configuration ({error}).") from error
    return _load_processor(model, visual_tokenizer.to(target).eval())


def _load_processor(model: str, visual_tokenizer: LavitVisualTokenizer) -> ImageTextProcessor:
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        raise ValueError(f"{model} has no processor_config.json: save the processor there, too.")
    return AutoProcessor.from_pretrained(model, visual_tokenizer=visual_tokenizer)


def _prepare(model: str, device: str, dtype: str) -> tuple[torch.device, str]:
    """Checks what is to be loaded before anything is read; returns the device and the dtype that `auto` stands for."""
    _check_checkpoint(model)
    _set_verbosity(model)
    target = resolve_device(device)
    return target, "float32" if dtype == "auto" and target.type == "cpu" else dtype


def _check_checkpoint(model: str) -> None:
    path = Path(model)
    if not path.exists():
        if len(path.parts) == 2 and not model.startswith((".", "/", "~")):
            return  # a name on the Hub
        raise ValueError(f"{model} does not exist; --model takes a converted checkpoint (see lavit convert --help).")
    if not path.is_dir():
        raise ValueError(f"{model} is not a directory; --model takes the directory of a converted checkpoint.")
    if (path / "visual_tokenizer").is_dir() and (path / "language_model").is_dir():
        raise ValueError(f"{model} is in LaVIT's original layout; convert it first: lavit convert {model} DST")
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise ValueError(f"{model} holds adapters of LoRA beside a model: keep them in a directory of their own.")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} holds adapters of LoRA, not a whole LaVIT: merge them into their base first "
            "(--merge_to of examples/finetune_lora.py, or merge_and_unload of PEFT)."
        )
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{model} is not a LaVIT checkpoint: it has no readable config.json.") from error
    if model_type != "lavit":
        raise ValueError(f"{model} is not a LaVIT checkpoint: its config.json is of a {model_type!r} model.")


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return target


def _has_random_weights(model: str) -> bool:
    card = Path(model) / "README.md"
    if not card.is_file():
        return False
    return RANDOM_WEIGHTS_TAG in (ModelCard.load(card, ignore_metadata_errors=True).data.tags or [])


def _set_verbosity(model: str) -> None:
    if not os.environ.get("LAVIT_DEBUG"):
        logging.set_verbosity_error()
    size = sum(file.stat().st_size for file in Path(model).glob("model*.safetensors"))
    if 0 < size < _BAR_BYTES:
        logging.disable_progress_bar()
