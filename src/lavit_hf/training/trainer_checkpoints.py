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
from transformers.trainer_utils import get_last_checkpoint, has_length
from transformers.utils import logging

from ..utils.atomic_files import write_json
from ..utils.distributed import sum_over_processes
from ..utils.json_files import read_json_object
from ..utils.paths import resolve_inside
from ..utils.safetensors_files import read_headers, read_index
from .sharded_checkpoints import (
    find_deepspeed_folders,
    is_data,
    require_harmless_shards,
    require_same_sharding,
    why_shards_are_incomplete,
)

logger = logging.get_logger(__name__)

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"  # written last
_WEIGHTS = ("model", "adapter_model", "pytorch_model", "pytorch_model_fsdp")
_OPTIONS = "training_args.bin"  # a pickle that `Trainer` writes and never reads
_RUN_FILE = "run.json"
# Settings that say which ones follow.
_OF_SAMPLES = ("seed", "data_seed", "dataset_size", "samples_per_update", "train_sampling_strategy")
_FULL, _SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"  # of accelerate's configuration


def find_trainer_checkpoint(
    name: str | None, output_dir: str | os.PathLike[str], trust_checkpoint: bool = False
) -> str | None:
    """Finds what to hand to `Trainer.train(resume_from_checkpoint=...)`.

    Args:
        name: A checkpoint's directory; `"latest"` for the last complete one of `output_dir`, if there is one; `None`
            for none.
        output_dir: Directory of the run.
        trust_checkpoint: Whether to go on from state that its library loads with all the code that is in it, as
            DeepSpeed does.

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
        return _check_content(Path(name), trust_checkpoint)
    for path in _all_checkpoints(Path(output_dir)):
        if reason := why_incomplete(path):
            logger.warning(f"{path} is skipped, as it is incomplete: {reason}.")
        else:
            return _check_content(path, trust_checkpoint)
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
    is_sharded = any(folder.glob("pytorch_model_fsdp_*/*")) or find_deepspeed_folders(folder)
    if not any(file.name.startswith(_WEIGHTS) for file in files) and not is_sharded:
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
    return why_shards_are_incomplete(folder)


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


def _check_content(folder: Path, trust_checkpoint: bool) -> str:
    """The directory of a checkpoint from which no code runs, and which holds what a run goes on from."""
    if not trust_checkpoint:
        require_harmless_shards(folder)
        if found := find_deepspeed_folders(folder):
            raise ValueError(
                f"{found[0]} holds pickles of DeepSpeed, which run whatever code is in them when they are loaded, so "
                "they are not. Trust them (--trust_checkpoint) if you know who wrote them, or start a new run from "
                "the weights (--model)."
            )
    files = sorted(path for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.glob(pattern))
    for file in files:
        if file.name != _OPTIONS and not is_data(file, mmap=True):
            raise ValueError(
                f"{file} holds more than data, or is damaged, so it is not loaded: whatever code is in it would run. "
                "Resume from another checkpoint."
            )
    if not any(folder.glob("optimizer*")) and not find_deepspeed_folders(folder):
        logger.warning(
            f"{folder} holds no state of the optimizer, which therefore starts anew: the run does not go on as if it "
            "had not been interrupted. Was it saved with `save_only_model`?"
        )
    return str(folder)


class ResumableTrainerMixin:
    """Lets a `Trainer` go on where the whole is one run, and only there; and save whole weights in the end.

    A run may go on in another number of processes, unsharded or by FSDP2, as long as an update has as many samples:
    which of them follow depends on it. `run.json` in every checkpoint says what else does.
    """

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As that of `Trainer`.

        Raises:
            FileExistsError: If `output_dir` has checkpoints and none is to be resumed from.
            ValueError: If the checkpoint belongs to a run with other data or settings, or was sharded in a way that
                this run cannot read; or if processes would not train the same model.
        """
        if self.is_fsdp_enabled:
            require_sound_sharding(self.model, self.accelerator)
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if found:
            state = str(self.accelerator.state.fsdp_plugin.state_dict_type) if self.is_fsdp_enabled else None
            fsdp_state = state and next((name for name in (_FULL, _SHARDED) if name in state), state)
            require_same_sharding(Path(found), self.args.world_size, fsdp_state, self.is_deepspeed_enabled)
            self.require_same_run(Path(found), other_samples=self.args.ignore_data_skip)
        else:
            require_no_run(str(self.args.output_dir))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:  # training that failed has no `on_train_end`
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CheckpointCallback):
                    callback.restore_signal()

    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As that of `Trainer`; while it is running, with what a resumed run has to share, and later always whole."""
        folder = Path(output_dir or self.args.output_dir)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.is_in_train:
            super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / _RUN_FILE, self.run_settings)
        elif plugin is not None and _SHARDED in str(plugin.state_dict_type):
            plugin.set_state_dict_type(_FULL)  # `Trainer` would save nothing
            try:
                super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
            finally:
                plugin.set_state_dict_type(_SHARDED)
        else:
            super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]

    @property
    def run_settings(self: Any) -> dict[str, Any]:
        """What a checkpoint has to share with a run that goes on from it."""
        return {
            "seed": self.args.seed,
            "dataset_size": len(self.train_dataset) if has_length(self.train_dataset) else None,
            "samples_per_update": self.get_total_train_batch_size(self.args),
            "train_sampling_strategy": str(self.args.train_sampling_strategy),
            "data_seed": self.args.data_seed,
        }

    def require_same_run(self: Any, checkpoint: Path, other_samples: bool = False) -> None:
        """Checks that what follows in a checkpoint's run would follow here. Those of plain `Trainer` do not say it.

        Args:
            checkpoint: Directory of the checkpoint.
            other_samples: Whether other samples may follow, as they do by `ignore_data_skip`.

        Raises:
            ValueError: Something else would follow, or the file that says so is damaged.
        """
        if not (checkpoint / _RUN_FILE).is_file():
            return
        try:
            saved = read_json_object(checkpoint / _RUN_FILE)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint / _RUN_FILE} is damaged ({error!s:.200}): resume from another checkpoint."
            ) from error
        settings = self.run_settings
        if other_samples:
            settings = {name: value for name, value in settings.items() if name not in _OF_SAMPLES}
        # What is not there was not noted yet by the version that wrote it.
        if changed := [name for name, value in settings.items() if name in saved and saved[name] != value]:
            differences = ", ".join(f"{name} was {saved[name]}, is {settings[name]}" for name in changed)
            hints = "".join(f" {hint}" for hint in self.explain_changes(changed))
            raise ValueError(
                f"{checkpoint} belongs to another run ({differences}). Resume with the same data and settings, or "
                f"start a new run in another output_dir.{hints}"
            )

    def explain_changes(self: Any, changed: list[str]) -> list[str]:
        """What else to say about settings that a checkpoint does not share."""
        if "samples_per_update" not in changed:
            return []
        return [
            "An update has processes x per_device_train_batch_size x gradient_accumulation_steps samples; here are "
            f"{self.args.world_size} process(es)."
        ]


def require_no_run(output_dir: str | os.PathLike[str]) -> None:
    """Checks that a new run will not be mixed with another one: `"latest"` would find either's checkpoints.

    Raises:
        FileExistsError: The directory has complete checkpoints.
    """
    if found := list_checkpoints(output_dir):
        raise FileExistsError(
            f"{output_dir} holds checkpoints of another run ({found[0].name}). Go on with it "
            f"(resume_from_checkpoint={LATEST!r}), or choose another output_dir."
        )


def require_sound_sharding(model: torch.nn.Module, accelerator: Any) -> None:
    """Checks that FSDP, as accelerate is told to use it, trains one model, and the one that is asked for.

    Raises:
        ValueError: It would not.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("Only FSDP2 shards a LaVIT: set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does.")
    ignored = plugin.ignored_modules or ()
    if isinstance(ignored, str):
        ignored = [module for name, module in model.named_modules() if re.fullmatch(ignored, name)]
    whole = {value for module in ignored for value in module.parameters()}
    for name, value in model.named_parameters():
        if value in whole and value.requires_grad:
            raise ValueError(
                f"{name} learns, but fsdp_ignored_modules leaves it out of FSDP: every process would come to weights "
                "of its own."
            )
        if ".selector." in name and value not in whole and accelerator.mixed_precision != "no":
            raise ValueError(
                f"{name} would be sharded, and compute in {accelerator.mixed_precision}: other patches would be kept "
                r"than by the model. Set fsdp_ignored_modules: .*\.(selector|quantizer), as "
                "examples/accelerate/fsdp2.yaml does."
            )


class CheckpointCallback(TrainerCallback):
    """Leaves none but finished checkpoints in `output_dir`: `Trainer(..., callbacks=[CheckpointCallback()])`.

    When training starts, what a killed run left half-written is removed. `Trainer` would write a checkpoint over one
    of the same name, file by file; killed in the middle of it, it would leave a mixture of both that looks complete.
    The old one is therefore removed before.

    SIGTERM, by which clusters take a machine back, saves a checkpoint after the update that is being computed,
    whichever process gets it, and ends all of them with exit status 0, without evaluation and a finished model. After
    the training it does what it did before; with a plain `Trainer` whose training fails it does not.
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
        self._is_asked_to_stop = self._has_stopped = False
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
        self.restore_signal()
        if self._has_stopped:
            raise SystemExit(0)

    def restore_signal(self) -> None:
        """Has SIGTERM do what it did before the training."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

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
    what it logs, every `logging_steps` updates, before every checkpoint and at the end. In float16 a scaler skips
    updates whose gradients are not finite, by design; there the loss alone decides, if it is not filtered.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or state.global_step >= state.max_steps > 0:
            control.should_log = True

    on_epoch_end = on_step_end

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
