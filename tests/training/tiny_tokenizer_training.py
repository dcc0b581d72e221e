"""A tiny stage 1 run with plain `Trainer`, for tests in this process and, as a script, in others."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from lavit_hf import LavitImageProcessorPil
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.visual_tokenizer import VisualTokenizerCallback, VisualTokenizerDataCollator
from modeling.tiny_pretraining import build_pretraining_model
from tiny_parts import picture_rows

NUM_SAMPLES, BATCH_SIZE = 24, 8
NUM_STEPS = 12  # four epochs
# Every phase, within these steps: at the end codes have been revived twice.
SCHEDULE = {
    "bypass_merger_steps": 2,
    "selector_steps": 3,
    "calibration_steps": 2,
    "quantize_after_steps": 5,
    "kmeans_tokens_per_code": 2,
    "revive_every_steps": 2,
    "center_targets": True,
}


def build_trainer(output_dir: str | Path, config: dict | None = None, **arguments: Any) -> Trainer:
    model = build_pretraining_model(**{**SCHEDULE, **(config or {})})
    defaults = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": NUM_STEPS,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = [{"image": row["image"]} for row in picture_rows(2 * NUM_SAMPLES) if row["image"] is not None][:NUM_SAMPLES]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=TrainingDataset(rows, text_column=None),
        eval_dataset=TrainingDataset(rows[:10], text_column=None),
        data_collator=VisualTokenizerDataCollator(LavitImageProcessorPil(size={"height": 16, "width": 16}), seed=1),
        callbacks=[EpochCallback()],
    )
    VisualTokenizerCallback(on_failure="ignore").attach(trainer)
    return trainer


def train_logs(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged for every step, without times."""
    times = ("epoch", "learning_rate", "grad_norm")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in log.items() if name not in times} for log in logs]


def main() -> None:
    options = json.loads(sys.argv[1])
    trainer = build_trainer(options["output_dir"], **options.get("arguments", {}))
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model(options["output_dir"])
        print(trainer.args.world_size, "processes", trainer.model_wrapped.__class__.__name__)
        Path(options["output_dir"], "logs.json").write_text(json.dumps(train_logs(trainer)))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # or a thread of gloo may outlive the interpreter, which then aborts
