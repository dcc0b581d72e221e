"""Checkpoints of the training loop: complete or not there at all."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import load as load_without_code  # type: ignore[import-untyped]
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ...utils.atomic_files import read_json

logger = logging.get_logger(__name__)

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "unfinished-checkpoint"
_RUN_FILE = "run.json"
_EMA_FILE = "ema.safetensors"
# What accelerate pickles of objects registered with it, and loads again with all the code that may be in it.
_PICKLED_OBJECTS = "custom_checkpoint_*.pkl"


class LoopCheckpoints:
    """Writes, finds and reads the checkpoints `checkpoint-<update>` of a run.

    A checkpoint gets its name once it is complete, so that a run killed at any moment leaves only complete ones; old
    ones are removed after that. Loading one runs no code, whoever wrote it. All processes call all methods.

    Args:
        folder: Directory of the run.
        accelerator: Holds what there is to save.
        run: What a checkpoint has to share with a run that goes on from it, of JSON's types.
        limit: How many to keep; `None` keeps all.
        ema: Averaged weights, which are saved as well.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        run: Mapping[str, Any],
        limit: int | None = None,
        ema: EMAModel | None = None,
    ):
        self.folder, self.accelerator, self.run, self.limit, self.ema = folder, accelerator, dict(run), limit, ema

    def save(self, update: int) -> Path:
        """Saves everything a resumed run needs, after this many updates."""
        unfinished, path = self.folder / _UNFINISHED, self.folder / f"checkpoint-{update}"
        self._remove_unfinished()
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(unfinished))
        except BaseException:  # on a full disk nothing should lie around that is of no use
            self._remove_unfinished()
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.ema is not None:
                _save_ema(self.ema, unfinished / _EMA_FILE)
            text = json.dumps({"update": update, **self.run}, indent=2)
            (unfinished / _RUN_FILE).write_text(text + "\n", encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)  # of a run that went on from before it
            unfinished.rename(path)
            older = [old for old in self._all() if _update_of(old) < update]
            for old in [] if self.limit is None else older[: len(older) + 1 - self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return path

    def require_none(self) -> None:
        """Refuses to start a new run on top of another one.

        Raises:
            FileExistsError: If the directory has checkpoints.
        """
        self._remove_unfinished()
        if found := self._all():
            raise FileExistsError(
                f"{self.folder} holds checkpoints of another run ({found[-1].name}). Go on with it "
                f"(resume_from_checkpoint={LATEST!r}), or choose another output_dir."
            )

    def load(self, name: str) -> int:
        """Restores everything from a checkpoint.

        Args:
            name: Its directory, or `"latest"` for the last one of the run, if there is one.

        Returns:
            The updates it was saved after; 0 if `"latest"` found none.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If it belongs to a run with other data or settings, is broken, or holds more than data.
        """
        self._remove_unfinished()
        if name == LATEST:
            found = self._all()
            if not found:
                logger.warning(f"There is no checkpoint in {self.folder} yet; training starts from the beginning.")
                return 0
            path = found[-1]
        else:
            path = Path(name)
        if not (path / _RUN_FILE).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint of this training: it has no {_RUN_FILE}.")
        saved = self._read_run(path)
        if changed := [key for key, value in self.run.items() if saved.get(key) != value]:
            differences = ", ".join(f"{key} was {saved.get(key)}, is {self.run[key]}" for key in changed)
            raise ValueError(
                f"{path} belongs to another run ({differences}). Resume with the same data and settings, or start a "
                "new run in another output_dir."
            )
        self._load_state(path)
        return saved["update"]

    def _read_run(self, path: Path) -> dict[str, Any]:
        try:
            saved = read_json(path / _RUN_FILE)
            return {**saved, "update": int(saved["update"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / _RUN_FILE} is damaged ({error!r}): resume from another checkpoint.") from error

    def _load_state(self, path: Path) -> None:
        """Restores weights, optimizer, schedule, averaged weights and random states."""
        if found := sorted(path.glob(_PICKLED_OBJECTS)):
            raise ValueError(
                f"{found[0]} is a pickle, which runs whatever code is in it when it is loaded, so it is not. Older "
                "versions of lavit-hf wrote such checkpoints: start a new run in another output_dir, or go on with "
                "the version that wrote it if you trust it."
            )
        random_states = path / f"random_states_{self.accelerator.process_index}.pkl"
        try:
            self.accelerator.load_state(str(path))
            if self.ema is not None:
                _load_ema(self.ema, path / _EMA_FILE)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch, safetensors and pickle have an error of their own for every kind of damage
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} is incomplete or damaged, or holds more than data ({reason}): resume from another checkpoint."
            ) from error
        _load_random_states(random_states)

    def _remove_unfinished(self) -> None:
        """Removes what a run that was killed while it wrote left behind."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)

    def _all(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_update_of)


def _save_ema(ema: EMAModel, path: Path) -> None:
    state = ema.state_dict()
    weights = {str(index): weight.detach().contiguous() for index, weight in enumerate(state.pop("shadow_params"))}
    save_file(weights, path, metadata={"ema": json.dumps(state)})


def _load_ema(ema: EMAModel, path: Path) -> None:
    """Restores averaged weights. As a model's, they have no names, but an order."""
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["ema"])
        weights = [file.get_tensor(str(index)) for index in range(len(file.keys()))]
    expected = [weight.shape for weight in ema.shadow_params]
    if [weight.shape for weight in weights] != expected:
        raise ValueError(f"{path.name} holds other weights than are trained")
    ema.load_state_dict({**state, "shadow_params": weights})


def _load_random_states(path: Path) -> None:
    """Restores what chance of this process stands at. accelerate does so, too, but goes on in silence if it cannot."""
    try:
        states = load_without_code(path)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is missing, damaged, or holds more than data ({reason}): what chance decides would come out "
            "differently. Resume from another checkpoint, with as many processes as before."
        ) from error


def _update_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


__all__ = ["LATEST", "LoopCheckpoints"]
