"""The log of a training run: one JSON object per line, and whatever trackers are wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers.utils import logging

from ...utils.atomic_files import complete_file

logger = logging.get_logger(__name__)

LOG_FILE = "log.jsonl"
VALIDATION_FOLDER = "validation"


class LoopLog:
    """Writes to `log.jsonl`, to the console, to PNG files and to the trackers of accelerate, in the main process only.

    Args:
        folder: Directory of the run.
        accelerator: Has the trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def rewind(self, update: int) -> None:
        """Forgets what was logged after this update: a resumed run logs it again."""
        path = self.folder / LOG_FILE
        if not self.accelerator.is_main_process or not path.exists():
            return
        # A killed run may leave half a line behind.
        complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
        kept = [line for line in complete if json.loads(line)["step"] <= update]
        with complete_file(path) as file:
            file.write("".join(kept).encode())

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Logs numbers."""
        if not self.accelerator.is_main_process:
            return
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": update, **values}) + "\n")
        logger.info(f"step {update}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log(dict(values), step=update)

    def write_image(self, update: int, image: PIL.Image.Image) -> Path:
        """Saves a validation image, and shows it to the trackers that take images; returns the file."""
        path = self.folder / VALIDATION_FOLDER / f"step-{update:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        for tracker in self.accelerator.trackers:
            log_images: Any = getattr(tracker, "log_images", None)
            if log_images is None:
                logger.warning(f"The tracker {tracker.name} takes no images; see {path}.")
            elif tracker.name == "tensorboard":
                log_images({"validation": np.asarray(image)[None]}, step=update, dataformats="NHWC")
            else:
                log_images({"validation": [image]}, step=update)
        return path


__all__ = ["LOG_FILE", "VALIDATION_FOLDER", "LoopLog"]
