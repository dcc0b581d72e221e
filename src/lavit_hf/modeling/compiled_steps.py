"""Steps of `generate` that are compiled, and the static caches that they run in.

On a GPU a step of one id takes longer to launch than to compute. transformers compiles the steps of a call whose cache
is static; here stands which models get such a cache without being asked, and how it goes from call to call. It is kept
because compiled steps are recorded with the addresses of its tensors (CUDA graphs): with the tensors of another cache
they would have to be recorded again. Its length is rounded up, so that prompts of different lengths share the steps.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

logger = logging.get_logger(__name__)

LENGTH_MULTIPLE = 128  # of positions in a cache
OLDEST_TORCH = "2.13"  # tested; 2.8 compiles a step anew for every size, until it gives up
_KEPT_SHARE = 0.1  # of a GPU's memory, at most
_COMPILERS = ("cc", "gcc", "clang")  # one of which Triton needs


class KeptCache(StaticCache):
    """A static cache that serves one call of `generate` after the other.

    Args:
        model: Whose steps fill it.
        rows: Rows of a step.
        length: Positions that a call needs, at least.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int):
        self.length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        super().__init__(config=model.config.get_text_config(decoder=True), max_cache_len=self.length)
        self.kind = self._kind(model, rows)

    def fits(self, model: PreTrainedModel, rows: int, length: int) -> bool:
        """Whether a call could use it; not if it is much too long, as steps look at all of it."""
        return self.kind == self._kind(model, rows) and length <= self.length <= 2 * max(length, LENGTH_MULTIPLE)

    def num_bytes(self) -> int:
        tensors = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))

    @staticmethod
    def _kind(model: PreTrainedModel, rows: int) -> tuple:
        # Tensors of inference mode cannot be changed outside of it.
        return rows, model.device, model.dtype, torch.is_inference_mode_enabled()


# By model, as an attribute would be copied and pickled with it.
_kept: WeakKeyDictionary[PreTrainedModel, KeptCache] = WeakKeyDictionary()


def take_cache(model: PreTrainedModel, rows: int, length: int) -> KeptCache:
    """An empty cache for a call: the one that was kept, if it fits, or a new one.

    Calls of other threads get another one, until [`keep_cache`] has it back.
    """
    kept = _kept.pop(model, None)
    if kept is not None and kept.fits(model, rows, length):
        kept.reset()
        return kept
    logger.warning_once(
        "generate compiles the steps of this call and of those like it, for which the first ones wait. "
        '`cache_implementation="dynamic"` turns it off, for a call or in the generation configuration.'
    )
    return KeptCache(model, rows, length)


def keep_cache(model: PreTrainedModel, cache: KeptCache) -> None:
    """Keeps a cache for the next call, unless it takes too much memory from all that may come between."""
    device = model.device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    if cache.num_bytes() <= _KEPT_SHARE * memory:
        _kept[model] = cache


def compiles_steps(model: PreTrainedModel) -> bool:
    """Whether steps of the model are worth compiling, and nothing speaks against it."""
    device = model.device
    config = model.config.get_text_config(decoder=True)
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        compiles_on(device)
        and not model.training
        and getattr(model.get_decoder(), "_can_compile_fullgraph", False)
        and config._attn_implementation in ("sdpa", "eager")  # others want masks of their own
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}  # others count positions in Python
        and (quantizer is None or quantizer.is_compileable)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(device.type)
        # CUDA graphs are recorded by thread, and not in all versions of PyTorch by any but the first.
        and threading.current_thread() is threading.main_thread()
        and not _is_spread(model, device)
    )


def compiles_on(device: torch.device) -> bool:
    """Whether models on the device wait for launches, and what compiles for it is there."""
    if device.type != "cuda" or torch.__version__ < OLDEST_TORCH or find_spec("triton") is None:
        return False
    return "CC" in os.environ or any(shutil.which(compiler) for compiler in _COMPILERS)


def _is_spread(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether weights are elsewhere, or come and go: with offloading, several devices or shards of other processes."""
    return (
        is_deepspeed_zero3_enabled()
        or is_fsdp_managed_module(model)
        or any(hasattr(module, "_hf_hook") for module in model.modules())  # of accelerate
        or any(one.device != device or hasattr(one, "device_mesh") for one in model.parameters())
    )
