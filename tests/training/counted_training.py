"""Runs a training script and notes what it trains on; for torchrun, in any number of processes.

Arguments: a JSON object of what is noted and done here, the script, and its arguments. The object has

- `notes`: a directory. Every process appends a line per batch to its file: update, and the samples with their epochs.
- `sigterm_at`, `sigkill_at`: the update in which the last process gets this signal; that of SIGKILL only if torchrun
  has not restarted it.
"""

import json
import os
import runpy
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from lavit_hf.training import (
    ImageDataCollator,
    LavitDataCollator,
    PixelDecoderDataCollator,
    VisualTokenizerDataCollator,
)

COLLATORS = (ImageDataCollator, LavitDataCollator, PixelDecoderDataCollator, VisualTokenizerDataCollator)


def note_samples(options: dict[str, Any]) -> None:
    """Notes what becomes a batch, in the order in which it is trained on, and sends the signals."""
    collated: deque[list[list[int]]] = deque()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for collator in COLLATORS:
        collator.__call__ = noting(collator.__call__, collated)
    compute = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        update = self.state.global_step + 1
        with Path(options["notes"], f"{rank}-of-{world_size}.jsonl").open("a") as file:
            file.write(json.dumps([update, *collated.popleft()]) + "\n")
        if rank == world_size - 1:
            if update == options.get("sigterm_at"):
                signal.raise_signal(signal.SIGTERM)
            if update == options.get("sigkill_at") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *args, **kwargs)

    Trainer.training_step = training_step


def noting(collate: Any, collated: deque[list[list[int]]]) -> Any:
    def call(self: Any, rows: Any) -> Any:
        rows = list(rows)
        collated.append([[row["epoch"], row["sample_id"]] for row in rows])
        return collate(self, rows)

    return call


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only, and leaves it on a CPU in silence; here it does not."""
    create = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as it does itself

    AcceleratorState.__init__ = init
    if int(os.environ["WORLD_SIZE"]) == 1:  # on a GPU accelerate makes a group of one
        dist.init_process_group("gloo")


if __name__ == "__main__":
    note_samples(json.loads(sys.argv[1]))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    if dist.is_initialized():
        dist.destroy_process_group()  # or a thread of gloo may outlive the interpreter, which then aborts
