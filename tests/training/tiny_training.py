"""A tiny stage 2 run with plain `Trainer`, for tests in this process and, as a script, in others."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling
from lavit_hf.training.streaming import MixturePart, StreamTrainer, load_stream
from tiny_parts import CHECKPOINT, picture_rows

# Three epochs and not a whole number of batches of four.
NUM_SAMPLES, BATCH_SIZE = 11, 4


def build_trainer(
    output_dir: str | Path,
    callbacks: Any = (),
    collator: dict | None = None,
    num_samples: int = NUM_SAMPLES,
    stream: str | None = None,
    trainer_class: type[Trainer] | None = None,
    **arguments,
) -> Trainer:
    """
    Args:
        stream: A directory of Parquet files to stream, in the place of so many samples.
        trainer_class: By default `Trainer`, or `StreamTrainer` if there is a stream.
    """
    torch.manual_seed(0)
    model = freeze_for_language_modeling(LavitForConditionalGeneration.from_pretrained(CHECKPOINT))
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model)
    defaults = {
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    dataset = TrainingDataset(picture_rows(num_samples))
    return (trainer_class or (Trainer if stream is None else StreamTrainer))(
        model=model,
        args=TrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=dataset if stream is None else load_stream([MixturePart(stream)], shuffle_buffer=3),
        eval_dataset=TrainingDataset(picture_rows(5)),
        data_collator=LavitDataCollator(processor, seed=1, condition_dropout=0.3, **(collator or {})),
        processing_class=processor,
        callbacks=[EpochCallback(), *callbacks],
    )


def script_environment() -> dict[str, str]:
    """The environment to run this file in."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(trainer: Trainer) -> list[float]:
    """Loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class KillAtStep(TrainerCallback):
    """Ends the process as a power failure would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    options = json.loads(sys.argv[1])
    callbacks = [KillAtStep(options["kill_at"])] if "kill_at" in options else []
    trainer = build_trainer(options["output_dir"], callbacks, **options.get("arguments", {}))
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model(options["output_dir"])
        print(trainer.args.world_size, "processes", trainer.model_wrapped.__class__.__name__)
        Path(options["output_dir"], "losses.json").write_text(json.dumps(losses(trainer)))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # or a thread of gloo may outlive the interpreter, which then aborts
