"""Options of the training loop for diffusion models, named as in the training scripts of diffusers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LoopArguments:
    """Options of [`AcceleratedLoop`]; fields for `HfArgumentParser`."""

    output_dir: str = option("out/training", "Where the result, checkpoints, validation images and log go.")
    seed: int = option(0, "Seed of everything that chance decides.")
    train_batch_size: int = option(16, "Samples per batch and process.")
    gradient_accumulation_steps: int = option(1, "Batches per update.")
    num_train_epochs: int = option(1, "Passes over the data, unless max_train_steps is given.")
    max_train_steps: int | None = option(None, "Updates in all.")
    learning_rate: float = option(1e-5, "Learning rate after warmup.")
    lr_scheduler: str = option("constant", "A schedule of diffusers: constant, constant_with_warmup, cosine, linear.")
    lr_warmup_steps: int = option(0, "Updates during which the learning rate rises.")
    adam_beta1: float = option(0.9, "First beta of AdamW.")
    adam_beta2: float = option(0.999, "Second beta of AdamW.")
    adam_weight_decay: float = option(1e-2, "Weight decay of AdamW.")
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 leaves them as they are.")
    mixed_precision: str | None = option(None, "no, fp16 or bf16; by default what accelerate is configured for.")
    allow_tf32: bool = option(False, "Lets fp32 matrix products use TF32 on GPUs that have it.")
    gradient_checkpointing: bool = option(False, "Computes activations again instead of keeping them.")
    use_ema: bool = option(True, "Averages the trained weights over time; the average is what gets saved.")
    ema_decay: float = option(0.9999, "Decay of that average, once it is warm.")
    dataloader_num_workers: int = option(0, "Processes that load data; 0 loads in the training process.")
    logging_steps: int = option(10, "Updates between two lines of the log.")
    checkpointing_steps: int = option(500, "Updates between two checkpoints; 0 writes none.")
    checkpoints_total_limit: int | None = option(None, "How many checkpoints to keep; by default all.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's directory, or 'latest' in output_dir, if any.")
    validation_steps: int = option(0, "Updates between two validations; 0 validates at the end only.")
    report_to: str | None = option(None, "Trackers of accelerate: tensorboard, wandb, all, ...; by default none.")
    run_name: str = option("lavit", "What trackers call the run.")

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late, or silently do something else."""
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr_warmup_steps", "checkpointing_steps", "validation_steps", "dataloader_num_workers"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("max_train_steps", self.max_train_steps is None or self.max_train_steps >= 1, "at least 1")
        limit = self.checkpoints_total_limit
        self._require("checkpoints_total_limit", limit is None or limit >= 1, "at least 1")
        self._require("learning_rate", self.learning_rate > 0, "positive")
        self._require("max_grad_norm", self.max_grad_norm >= 0, "at least 0")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._require("mixed_precision", self.mixed_precision in (None, "no", "fp16", "bf16"), "no, fp16 or bf16")

    def _require(self, name: str, is_met: bool, wanted: str) -> None:
        if not is_met:
            raise ValueError(f"`{name}` must be {wanted}; got {getattr(self, name)!r}.")


__all__ = ["LoopArguments", "option"]
