"""Loads model, processor and pixel decoder for commands, with errors that name what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from safetensors import SafetensorError
from transformers.utils import logging

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitVisualTokenizer
from lavit_hf.modeling.checkpoint_files import load_complete
from lavit_hf.modeling.compiled_steps import compiles_on
from lavit_hf.training.language_model.adapters import apply_adapter, find_adapter
from lavit_hf.utils.distributed import process_state
from lavit_hf.utils.progress import bar_options

if TYPE_CHECKING:
    from lavit_hf.pipelines import LavitTextToImagePipeline

RANDOM_WEIGHTS_TAG = "random-weights"

# Below this size a progress bar would be gone before anyone read it.
_BAR_BYTES = 500_000_000
_DEVICES = "devices are called cpu, cuda, cuda:1, mps or xpu, and auto takes cuda if there is one"


@dataclass
class Lavit:
    """What a command needs.

    Attributes:
        model: On its device, ready to generate.
        processor: With the model's visual tokenizer, which gives images codes.
        random_weights: Whether the checkpoint's card says that its weights are random.
        pixel_decoders: Where its pixel decoders are.
        compiles: Whether what runs often is compiled.
    """

    model: LavitForConditionalGeneration
    processor: ImageTextProcessor
    random_weights: bool
    pixel_decoders: str
    compiles: bool = False


def load(model: str, device: str = "auto", dtype: str = "auto", compile: bool | None = False) -> Lavit:
    """Loads a checkpoint.

    Args:
        model: Directory, or name on the Hub; of adapters of LoRA, too, which are merged into their base.
        device: `"auto"` is the first CUDA device, or the CPU if there is none.
        dtype: `"auto"` is half precision on CUDA devices (bfloat16 where they compute in it), float32 on a CPU, where
            half precision can be 100 times slower, and as stored elsewhere.
        compile: Whether to compile what runs often; `None` compiles where it is possible.

    Returns:
        Model and processor.

    Raises:
        ValueError: The checkpoint or the device cannot be used, or not compiled for.
    """
    target = _prepare(device)
    compiles = compiles_on(target) if compile is None else compile
    if compiles and not compiles_on(target):
        raise ValueError(
            f"--compile cannot be used on {target}: it needs a CUDA device, with Triton and a C compiler such as gcc."
        )
    return _load(model, target, running_dtype(target) if dtype == "auto" else dtype, compiles)


def _load(model: str, target: torch.device, dtype: str, compiles: bool) -> Lavit:
    adapter = find_adapter(model)
    base = adapter.base if adapter else model
    loaded = _load_model(base, dtype)
    if adapter:
        loaded = apply_adapter(loaded, adapter)
    loaded = loaded.to(target).eval()  # type: ignore[arg-type]  # its wrapper hides self
    if not compiles:
        loaded.generation_config.disable_compile = True
    processor = _load_processor(adapter.processor if adapter else model, loaded.visual_tokenizer)
    card = Path(base) / "README.md"
    tags = ModelCard.load(card, ignore_metadata_errors=True).data.tags if card.is_file() else None
    return Lavit(loaded, processor, RANDOM_WEIGHTS_TAG in (tags or []), pixel_decoders=base, compiles=compiles)


def _load_model(model: str, dtype: str) -> LavitForConditionalGeneration:
    try:
        with bars_of_loading(model):
            return load_complete(LavitForConditionalGeneration, model, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"{model}: the weights are corrupt ({error}).") from error
    except RuntimeError as error:
        raise ValueError(f"{model}: the weights do not fit the configuration ({error}).") from error
    except OSError as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error


def load_processor(model: str, device: str = "auto", dtype: str = "auto") -> ImageTextProcessor:
    """Loads a checkpoint's processor and visual tokenizer, and nothing of its language model; see `load`.

    `"auto"` does not round more than it has to: float32 on a CPU, and as stored elsewhere.
    """
    target = _prepare(device)
    dtype = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    adapter = find_adapter(model)
    if adapter and adapter.touches_visual_tokenizer:
        return _load(model, target, dtype, compiles=False).processor
    base = adapter.base if adapter else model
    try:
        with bars_of_loading(base):
            visual_tokenizer = LavitVisualTokenizer.from_pretrained(base, dtype=dtype)
    except RuntimeError as error:
        raise ValueError(f"{base}: the weights do not fit the configuration ({error}).") from error
    visual_tokenizer = visual_tokenizer.to(target).eval()  # type: ignore[arg-type]  # its wrapper hides self
    return _load_processor(adapter.processor if adapter else model, visual_tokenizer)


def load_pipeline(lavit: Lavit, decoder: str | None = None) -> LavitTextToImagePipeline:
    """Adds a pixel decoder to a loaded checkpoint, by default the high-resolution one.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: The checkpoint has no such pixel decoder, or one of other codes.
    """
    from diffusers.utils import logging as diffusers_logging

    from lavit_hf.pipelines import LavitTextToImagePipeline

    parts = {"model": lavit.model, "processor": lavit.processor}
    try:
        with bars_of_loading(lavit.pixel_decoders, "**/diffusion_pytorch_model*.safetensors", diffusers_logging):
            pipeline = LavitTextToImagePipeline.from_pretrained(
                lavit.pixel_decoders, decoder=decoder, dtype=lavit.model.dtype, **parts
            )
    except OSError as error:
        raise ValueError(f"{lavit.pixel_decoders} cannot draw: {error}") from error
    # No bars for what takes less than a second.
    pipeline.set_progress_bar_config(**bar_options("Drawing", delay=1.0, leave=False))
    pipeline = pipeline.to(lavit.model.device)
    return pipeline.optimize(warm_up=False) if lavit.compiles else pipeline


def _load_processor(model: str, visual_tokenizer: LavitVisualTokenizer) -> ImageTextProcessor:
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        raise ValueError(f"{model} has no processor_config.json: save the processor there, too.")
    return ImageTextProcessor.from_pretrained(model, visual_tokenizer=visual_tokenizer)


def _prepare(device: str) -> torch.device:
    if not os.environ.get("LAVIT_DEBUG"):
        logging.set_verbosity_error()
    return resolve_device(device)


def running_dtype(device: torch.device) -> str:
    """The dtype that `auto` stands for where a model runs: the one that the device computes fastest in."""
    if device.type != "cuda":
        return "float32" if device.type == "cpu" else "auto"
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8:  # Ampere
        return "bfloat16"
    return "float16" if major == 7 else "float32"  # Volta and Turing; before them, halves are slow


def resolve_device(device: str) -> torch.device:
    """The device of this name; `auto` is the first CUDA device, or the CPU if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:  # it lists some twenty types of devices, most of which no torch has
        raise ValueError(f"--device {device} cannot be used: {_DEVICES}.") from error
    if target.type == "meta":
        raise ValueError(f"--device {device} cannot be used: it holds no numbers; {_DEVICES}.")
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"--device {device} cannot be used: {reason}; {_DEVICES}.") from error
    return target


def join_processes(device: str) -> tuple[Any, str]:
    """Joins the processes that accelerate or torchrun started.

    Args:
        device: As for `load`; for `"auto"`, each of several processes has a device of its own.

    Returns:
        An `accelerate.PartialState`, and the device of this process.
    """
    state = process_state(resolve_device(device))
    if device == "auto" and state.num_processes > 1:
        device = str(state.device)
    return state, device


@contextmanager
def without_bars(logging: Any) -> Iterator[None]:
    """Hides the progress bars of a library, given as its module `logging`, of what is gone before anyone has read it.

    transformers hides those of huggingface_hub along with its own, which ours are, too: only for as long as needed.
    """
    # Set to false, the variable asks for bars; set to true, diffusers does not know of it.
    if HF_HUB_DISABLE_PROGRESS_BARS is False or not logging.is_progress_bar_enabled():
        yield  # decided already
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def bars_of_loading(model: str, pattern: str = "model*.safetensors", *libraries: Any) -> Iterator[None]:
    """Hides bars of transformers and other libraries while something small is loaded; not those of downloads.

    Args:
        model: Directory, or name on the Hub.
        pattern: Of the files of weights in the directory.
        libraries: Modules called `logging`, besides that of transformers.
    """
    size = sum(file.stat().st_size for file in Path(model).glob(pattern))
    with ExitStack() as stack:
        if 0 < size < _BAR_BYTES:
            for library in (logging, *libraries):
                stack.enter_context(without_bars(library))
        yield
