"""A tiny evaluation, to be run in this process, in several, or in one that dies."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lavit_cli.loading import load, load_pipeline
from lavit_hf.evaluation import TASKS, EvaluatedCheckpoint, evaluate, read_data
from lavit_hf.evaluation.predictions import PredictionWriter

NUM_SAMPLES = 7
BATCH_SIZE = 2  # four batches, the last one with one sample
OPTIONS = {
    "caption": {"max_new_tokens": 5, "num_beams": 1},
    "reconstruction": {"num_inference_steps": 2},
}


def load_checkpoint(path: Path) -> EvaluatedCheckpoint:
    lavit = load(str(path), "cpu")

    def pipeline(decoder: str | None) -> Any:
        loaded = load_pipeline(lavit, decoder)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return EvaluatedCheckpoint(str(path), lavit.model, lavit.processor, pipeline)


def run(checkpoint: EvaluatedCheckpoint, output: Path) -> dict[str, Any]:
    """Captions and reconstructions of a few scenes."""
    tasks = [
        TASKS[name](read_data("scenes", name, split="held_out", num_samples=NUM_SAMPLES), options)
        for name, options in OPTIONS.items()
    ]
    # As many threads everywhere, so that nothing but what is tested differs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate(checkpoint, tasks, output, batch_size=BATCH_SIZE, progress=False)
    finally:
        torch.set_num_threads(threads)


def die_after(num_batches: int) -> None:
    """Ends this process as a power failure would, in the middle of a line."""
    finish, batches = PredictionWriter.flush, []

    def flush(writer: PredictionWriter) -> None:
        finish(writer)
        batches.append(writer)
        if len(batches) == num_batches:
            writer._file.write(b'{"id": "00000')
            writer._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    PredictionWriter.flush = flush


if __name__ == "__main__":
    path, output, num_batches = sys.argv[1:]
    if int(num_batches):
        die_after(int(num_batches))
    run(load_checkpoint(Path(path)), Path(output))
