"""What the trainings of all variants have in common."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments


def training_arguments(
    output_dir: Path, num_steps: int, batch_size: int, learning_rate: float, weight_decay: float, bf16: bool
) -> TrainingArguments:
    """Arguments for a short run that is not resumed."""
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=weight_decay,
        logging_steps=50,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),  # which bf16 has to be told
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
