"""Checkpoints of `Trainer`, which is killed now and then while it writes one."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ..utils.distributed import sum_over_processes
from ..utils.json_files import read_json_object
from ..utils.paths import resolve_inside
from ..utils.safetensors_files import read_headers, read_index

logger = logging.get_logger(__name__)

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"  # written last
_WEIGHTS = ("model", "adapter_model", "pytorch_model", "pytorch_model_fsdp")
# What torch and DeepSpeed write of sharded states, and load again with all the code that may be in it.
_PICKLED = ("**/.metadata", "global_step*/*.pt")
_OPTIONS = "training_args.bin"  # a pickle that `Trainer` writes and never reads


def find_trainer_checkpoint(name: str | None, output_dir: str | os.PathLike[str]) -> str | None:
    """Finds what to hand to `Trainer.train(resume_from_checkpoint=...)`.

    Args:
        name: A checkpoint's directory; `"latest"` for the last complete one of `output_dir`, if there is one; `None`
            for none.
        output_dir: Directory of the run.

    Returns:
        The directory, or `None` to start from the beginning.

    Raises:
        ValueError: If the directory is no complete checkpoint, or one that holds more than data.
    """
    if name is None:
        return None
    if name != LATEST:
        if reason := why_incomplete(Path(name)):
            raise ValueError(
                f"{name} is no complete checkpoint: {reason}. Resume from another one; {LATEST!r} takes the last "
                "complete one."
            )
        return _check_content(Path(name))
    for path in _all_checkpoints(Path(output_dir)):
        if reason := why_incomplete(path):
            logger.warning(f"{path} is skipped, as it is incomplete: {reason}.")
        else:
            return _check_content(path)
    logger.warning(f"There is no complete checkpoint in {output_dir} yet; training starts from the beginning.")
    return None


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run, the last one first."""
    return [path for path in _all_checkpoints(Path(output_dir)) if not why_incomplete(path)]


def _all_checkpoints(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def why_incomplete(folder: Path) -> str | None:
    """What a checkpoint lacks, such as one that `Trainer` was killed in the middle of; `None` if nothing."""
    if reason := _why_unfinished(folder):
        return reason
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    if not any(file.name.startswith(_WEIGHTS) for file in files) and not any(folder.glob("pytorch_model_fsdp_*/*")):
        return "it has no weights"
    try:
        for index in sorted(folder.glob("*.index.json")):
            files += [resolve_inside(folder, name, index.name) for name in read_index(index)]
    except (OSError, ValueError):
        return f"{index.name} is damaged"
    # Random states of other processes are written side by side with the rest.
    for file in [*files, *sorted(folder.glob("*.pt")), *sorted(folder.glob("*.pth"))]:
        if not _is_whole(file):
            return f"{file.name} is missing or damaged"
    return None


def _why_unfinished(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such directory"
    if not (folder / _STATE).exists():
        return f"it has no {_STATE}"
    try:
        int(read_json_object(folder / _STATE)["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_STATE} is damaged"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file of tensors ends where it should; its head (of safetensors) or end (of zip archives) says so."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    try:
        read_headers(file)
    except OSError:
        return False
    return True


def _check_content(folder: Path) -> str:
    """The directory of a checkpoint from which no code runs, and which holds what a run goes on from."""
    if found := next((path for pattern in _PICKLED for path in folder.glob(pattern)), None):
        raise ValueError(
            f"{found} is a pickle, which runs whatever code is in it when it is loaded, so it is not. Shard with "
            "`fsdp_state_dict_type: FULL_STATE_DICT`, as examples/accelerate/fsdp2.yaml does."
        )
    files = sorted(path for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.glob(pattern))
    for file in files:
        if file.name != _OPTIONS and not _is_data(file):
            raise ValueError(
                f"{file} holds more than data, or is damaged, so it is not loaded: whatever code is in it would run. "
                "Resume from another checkpoint."
            )
    if not any(folder.glob("optimizer*")) and not any(folder.glob("*/optimizer*")):
        logger.warning(
            f"{folder} holds no state of the optimizer, which therefore starts anew: the run does not go on as if it "
            "had not been interrupted. Was it saved with `save_only_model`?"
        )
    return str(folder)


def _is_data(file: Path) -> bool:
    """Whether `Trainer` can load a file of torch, which it does with `weights_only=True`."""
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # a broken pickle raises anything; and torch's own words advise to load what is refused
        return False
    return True


class CheckpointCallback(TrainerCallback):
    """Leaves none but finished checkpoints in `output_dir`: `Trainer(..., callbacks=[CheckpointCallback()])`.

    When training starts, what a killed run left half-written is removed. `Trainer` would write a checkpoint over one
    of the same name, file by file; killed in the middle of it, it would leave a mixture of both that looks complete.
    The old one is therefore removed before.

    SIGTERM, by which clusters take a machine back, saves a checkpoint after the update that is being computed,
    whichever process gets it, and ends all of them with exit status 0, without evaluation and a finished model.
    """

    def __init__(self) -> None:
        self._is_asked_to_stop = self._has_stopped = False
        self._process = 0
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            remove_incomplete_checkpoints(str(args.output_dir))
        PartialState().wait_for_everyone()
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._process = os.getpid()
            self._previous = signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if os.getpid() == self._process:
            self._is_asked_to_stop = True
        else:  # a worker that loads data, and was forked with this handler
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if self._has_stopped:
            raise SystemExit(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_asked = self._is_asked_to_stop
        if args.world_size > 1:  # a single process does not wait for its device
            is_asked = bool(sum_over_processes(torch.tensor(float(is_asked), device=args.device)) > 0)
        if is_asked and not self._has_stopped:
            self._has_stopped = True
            logger.warning(f"SIGTERM: update {state.global_step} is saved, and training ends.")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if not control.should_save:
            return
        if state.is_world_process_zero:
            shutil.rmtree(Path(str(args.output_dir), f"checkpoint-{state.global_step}"), ignore_errors=True)
        PartialState().wait_for_everyone()

    on_epoch_end = on_step_end


class FiniteGradientsCallback(TrainerCallback):
    """Stops `Trainer` when gradients are no numbers, before a checkpoint of spoiled weights is written.

    `Trainer` goes on: by default (`logging_nan_inf_filter`) it logs a loss of 0 for as long as it is NaN. Looked at is
    what it logs, every `logging_steps` updates and before every checkpoint. In float16 a scaler skips updates whose
    gradients are not finite, by design; there the loss alone decides, if it is not filtered.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = logs or {}
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            require_finite(found.get(name) or 0.0, name, state.global_step, str(args.output_dir))


def require_finite(value: float, name: str, update: int, output_dir: str) -> None:
    """Checks a number of an update.

    Raises:
        FloatingPointError: It is infinite or NaN.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value} in update {update}: training stops before a checkpoint of spoiled weights is written. "
            f"Resume from the last checkpoint in {output_dir} with a lower learning rate, more warmup or bf16 instead "
            "of fp16, and check the data. On a GPU, try --sdpa_backend efficient, too: cuDNN's attention has "
            "returned NaN for rows that see nothing, such as padding on the left."
        )


def remove_incomplete_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Removes the checkpoints that a run did not finish: it was killed, or met a full disk."""
    for path in _all_checkpoints(Path(output_dir)):
        if _why_unfinished(path):
            shutil.rmtree(path, ignore_errors=True)
