"""Checkpoints of the training loop: complete or not there at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers.utils import logging

logger = logging.get_logger(__name__)

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = "unfinished-checkpoint"
_RUN_FILE = "run.json"


class LoopCheckpoints:
    """Writes, finds and reads the checkpoints `checkpoint-<update>` of a run.

    A checkpoint gets its name once it is complete, so that a run killed at any moment leaves only complete ones; old
    ones are removed after that. All processes call all methods.

    Args:
        folder: Directory of the run.
        accelerator: Holds what there is to save.
        run: What a checkpoint has to share with a run that goes on from it, of JSON's types.
        limit: How many to keep; `None` keeps all.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, run: Mapping[str, Any], limit: int | None = None):
        self.folder, self.accelerator, self.run, self.limit = folder, accelerator, dict(run), limit

    def save(self, update: int) -> Path:
        """Saves everything a resumed run needs, after this many updates."""
        unfinished, path = self.folder / _UNFINISHED, self.folder / f"checkpoint-{update}"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
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
            ValueError: If it belongs to a run with other data or settings.
        """
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
        saved = json.loads((path / _RUN_FILE).read_text(encoding="utf-8"))
        if changed := [key for key, value in self.run.items() if saved.get(key) != value]:
            differences = ", ".join(f"{key} was {saved.get(key)}, is {self.run[key]}" for key in changed)
            raise ValueError(
                f"{path} belongs to another run ({differences}). Resume with the same data and settings, or start a "
                "new run in another output_dir."
            )
        self.accelerator.load_state(str(path))
        return saved["update"]

    def _all(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_update_of)


def _update_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


__all__ = ["LATEST", "LoopCheckpoints"]
