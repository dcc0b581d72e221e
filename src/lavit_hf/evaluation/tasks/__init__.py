"""What a checkpoint can be asked to do: one task per file."""

from .base import Prediction, Record, Shown, Task
from .caption import CaptionTask
from .reconstruction import ReconstructionTask
from .text_to_image import TextToImageTask
from .vqa import VqaTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (CaptionTask, VqaTask, TextToImageTask, ReconstructionTask)
}

__all__ = [
    "TASKS",
    "CaptionTask",
    "Prediction",
    "ReconstructionTask",
    "Record",
    "Shown",
    "Task",
    "TextToImageTask",
    "VqaTask",
]
