"""A training loop for diffusion models with accelerate, as in the training scripts of diffusers.

`Trainer` of transformers trains one `PreTrainedModel`; here several networks of diffusers and transformers take part,
some of them frozen. Unlike in the scripts of diffusers, a resumed run equals an uninterrupted one bit by bit, several
processes equal one with a larger batch, and checkpoints are complete or not there.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import send_to_device, set_seed  # type: ignore[import-untyped]
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader

from .arguments import LoopArguments
from .checkpoints import LoopCheckpoints
from .log import LoopLog
from .update_sampler import UpdateBatchSampler


class LoopTask(Protocol):
    """What [`AcceleratedLoop`] trains."""

    @property
    def module(self) -> nn.Module:
        """Holds everything that is trained. Called with what `prepare` returns, it gives a dictionary with the scalar
        `loss`, the mean over the batch, and maybe other scalars to log.
        """

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What is trained, for the optimizer."""

    def enable_gradient_checkpointing(self) -> None:
        """Saves memory at the cost of time."""

    def to(self, device: torch.device) -> None:
        """Moves the frozen networks, which are not in `module`."""

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the frozen networks make of a batch: arguments for `module`."""

    def validate(self) -> tuple[dict[str, float], PIL.Image.Image | None]:
        """Numbers to log, and an image to look at."""

    def save(self, folder: Path) -> None:
        """Saves the trained result."""


class AcceleratedLoop:
    """Trains a task: accumulation, mixed precision, averaged weights, checkpoints, validation.

    Args:
        task: What to train.
        args: Options.
        dataset: Samples, with `set_epoch` if they depend on it, as those of [`TrainingDataset`] do.
        collator: Makes batches of them.

    Raises:
        ValueError: If the dataset is smaller than an update.
    """

    def __init__(self, task: LoopTask, args: LoopArguments, dataset: Any, collator: Callable[[list], dict]) -> None:
        self.task, self.args, self.dataset, self.collator = task, args, dataset, collator
        self.folder = Path(args.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to in (None, "none") else args.report_to,
            project_dir=str(self.folder),
            step_scheduler_with_optimizer=False,  # the loop counts updates, whatever the number of processes
        )
        self.sampler = UpdateBatchSampler(
            len(dataset),
            args.train_batch_size,
            args.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            args.seed,
        )
        self.num_updates = args.max_train_steps or args.num_train_epochs * self.sampler.updates_per_epoch
        self.log = LoopLog(self.folder, self.accelerator)

    def train(self) -> float:
        """Trains, and saves the result to `output_dir`.

        Returns:
            The mean loss of the last update; NaN if a run is resumed that had nothing left to do.

        Raises:
            FileExistsError: If `output_dir` has checkpoints and none is to be resumed from.
            FloatingPointError: If the loss or the gradient is not finite.
        """
        self._set_up()
        update = self._resume()
        last_loss = math.nan
        while update < self.num_updates:
            self.sampler.start(update)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(self.sampler.epoch)
            batches = iter(self._data_loader())
            for _ in range(min(len(self.sampler) // self.args.gradient_accumulation_steps, self.num_updates - update)):
                last_loss = self._update(update, batches)
                update += 1
                self._after_update(update)
        self._finish()
        return last_loss

    def _set_up(self) -> None:
        args, accelerator = self.args, self.accelerator
        set_seed(args.seed, device_specific=True)  # for dropout, if a network has any: all else has seeds of its own
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        if args.gradient_checkpointing:
            self.task.enable_gradient_checkpointing()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.to(accelerator.device)
        groups = self.task.parameter_groups(args.learning_rate)
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.num_updates,
        )
        self.module, self.optimizer, self.schedule = accelerator.prepare(self.task.module, optimizer, schedule)
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None
        if accelerator.log_with:
            accelerator.init_trackers(args.run_name, dataclasses.asdict(args))

    def _resume(self) -> int:
        """Restores a checkpoint if one is wanted; returns how many updates are done."""
        run = {
            "seed": self.args.seed,
            "dataset_size": len(self.dataset),
            "samples_per_update": self.sampler.update_size,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "use_ema": self.args.use_ema,
        }
        self.checkpoints = LoopCheckpoints(
            self.folder, self.accelerator, run, self.args.checkpoints_total_limit, self.ema
        )
        name = self.args.resume_from_checkpoint
        if name is None:
            self.checkpoints.require_none()
        update = 0 if name is None else self.checkpoints.load(name)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.log.rewind(update)
        self._since = (update, time.perf_counter())
        return update

    def _data_loader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _update(self, update: int, batches: Any) -> float:
        """One update of the weights; returns the loss, the mean over all processes and accumulated batches."""
        accelerator, args = self.accelerator, self.args
        self.module.train()
        outputs: list[dict[str, torch.Tensor]] = []
        for _ in range(args.gradient_accumulation_steps):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.module):
                output = self.module(**self.task.prepare(batch))
                accelerator.backward(output["loss"])
                outputs.append({name: value.detach() for name, value in output.items() if value.ndim == 0})
        means = {name: torch.stack([output[name].float() for output in outputs]).mean() for name in outputs[0]}
        self.last = {name: value.item() for name, value in accelerator.reduce(means, reduction="mean").items()}
        self._require_finite(self.last["loss"], "loss", update)
        norm = accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm or math.inf).item()
        if accelerator.scaler is None:  # a gradient scaler skips updates whose gradient is not finite, by design
            self._require_finite(norm, "gradient's norm", update)
        self.last["grad_norm"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return self.last["loss"]

    def _require_finite(self, value: float, name: str, update: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The {name} is {value} in update {update + 1}: training stops before it spoils the weights. Resume "
                f"from the last checkpoint in {self.folder} with a lower learning rate, more warmup or "
                "mixed_precision bf16 instead of fp16, and check the data."
            )

    def _after_update(self, update: int) -> None:
        args, is_last = self.args, update == self.num_updates
        if update % args.logging_steps == 0 or is_last:
            before, start = self._since
            now = time.perf_counter()
            speed = (update - before) * self.sampler.update_size / max(now - start, 1e-9)
            self._since = (update, now)
            rate = self.schedule.get_last_lr()[0]
            self.log.write(update, {**self.last, "learning_rate": rate, "samples_per_second": speed})
        if args.checkpointing_steps and update % args.checkpointing_steps == 0:
            self.checkpoints.save(update)
        if is_last or (args.validation_steps and update % args.validation_steps == 0):
            self._validate(update)

    def _validate(self, update: int) -> None:
        """Validates the averaged weights, in the main process; the others wait at their next exchange."""
        if not self.accelerator.is_main_process:
            return
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.module.eval()
        with torch.no_grad():
            numbers, image = self.task.validate()
        if numbers:
            self.log.write(update, {f"validation_{name}": value for name, value in numbers.items()})
        if image is not None:
            self.log.write_image(update, image)
        if self.ema is not None:
            self.ema.restore(self.parameters)

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.ema is not None:
                self.ema.copy_to(self.parameters)
            self.module.eval()
            self.task.save(self.folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


__all__ = ["AcceleratedLoop", "LoopTask"]
