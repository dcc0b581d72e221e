"""`Trainer` for networks of diffusers, which are trained beside others that are frozen.

What `Trainer` sees, moves and saves is a module of the trained networks and their average. The frozen ones stay
outside: they make the inputs of that module from a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import PIL.Image
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...utils.seeds import sample_seed
from ..dataset import EpochCallback
from ..streaming import StreamedTrainingDataset, StreamTrainerMixin
from ..trainer_checkpoints import (
    LATEST,
    CheckpointCallback,
    find_trainer_checkpoint,
    remove_incomplete_checkpoints,
    require_finite,
    require_no_run,
)
from ..validation_pictures import show_picture

# What a resumed run cannot do without, and `Trainer` would go on without in silence.
_STATES = ("run.json", "optimizer.pt", "scheduler.pt")
_NOT_HERE = {
    "auto_find_batch_size": "an update has the size it is asked for",
    "deepspeed": "every process needs whole networks, to average and to validate them",
    "fsdp": "every process needs whole networks, to average and to validate them",
    "label_smoothing_factor": "there are no labels",
    "neftune_noise_alpha": "there are no embeddings of text",
    "push_to_hub": "`lavit publish` uploads what the training saves",
}


def option(default: Any, text: str) -> Any:
    """A field for `HfArgumentParser`."""
    return field(default=default, metadata={"help": text})


@dataclass
class DiffusersTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the training scripts of diffusers, and an average of the weights."""

    output_dir: str | None = option("out/training", "Where the result, checkpoints, validation images and log go.")
    seed: int = option(0, "Seed of all random choices.")
    per_device_train_batch_size: int = option(16, "Samples per batch and process.")
    per_device_eval_batch_size: int = option(16, "Samples per batch and process in a validation.")
    num_train_epochs: float = option(1.0, "Passes over the data, unless max_steps is given.")
    learning_rate: float = option(1e-5, "Learning rate after warmup.")
    lr_scheduler_type: str = option("constant", "Schedule: constant, constant_with_warmup, cosine, linear, ...")
    weight_decay: float = option(1e-2, "Weight decay of AdamW, of all weights, as diffusers has it.")
    logging_steps: float = option(10, "Updates between two lines of the log.")
    remove_unused_columns: bool = option(False, "Leave it: the collator needs all columns.")
    ddp_find_unused_parameters: bool | None = option(False, "Leave it: every update uses all trained weights.")
    num_validation_images: int = option(4, "Images to draw in a validation, from the first rows held out for it.")
    use_ema: bool = option(True, "Averages the trained weights over time; the average is what gets saved.")
    ema_decay: float = option(0.9999, "Decay of that average, once it is warm.")

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late, or silently do something else."""
        for name, reason in _NOT_HERE.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` is not for this training: {reason}. Leave it out.")
        super().__post_init__()
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("save_total_limit", self.save_total_limit is None or self.save_total_limit >= 1, "at least 1")
        self.require("learning_rate", self.learning_rate > 0, "positive")
        self.require("max_grad_norm", self.max_grad_norm >= 0, "at least 0")
        self.require("num_validation_images", self.num_validation_images >= 0, "at least 0")
        self.require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self.require("train_sampling_strategy", self.train_sampling_strategy == "random", "random")
        self.require("remove_unused_columns", not self.remove_unused_columns, "false")

    def require(self, name: str, is_met: bool, wanted: str) -> None:
        """Raises a `ValueError` about an option unless it is as wanted."""
        if not is_met:
            raise ValueError(f"`{name}` must be {wanted}; got {getattr(self, name)!r}.")


class UpdateSampler(Sampler[int]):
    """The samples of an epoch, in an order that depends on seed and epoch alone, in whole updates.

    What is left over at the end of an epoch waits for another one. As every update has all its samples, nothing has to
    be repeated to fill it, and several processes train like one with a larger batch.

    Args:
        num_samples: Size of the dataset.
        update_size: Samples of an update, over all processes and accumulated batches.
        seed: Seed of the order.

    Raises:
        ValueError: If the dataset is smaller than an update.
    """

    def __init__(self, num_samples: int, update_size: int, seed: int) -> None:
        if num_samples < update_size:
            raise ValueError(
                f"The dataset has {num_samples} samples, but one update takes {update_size} (batch size x accumulated "
                "batches x processes). Lower the batch size."
            )
        self.num_samples, self.update_size, self.seed = num_samples, update_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of this epoch; [`EpochCallback`] calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples - self.num_samples % self.update_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, 0, "order of samples"))
        return iter(torch.randperm(self.num_samples, generator=generator).tolist()[: len(self)])


class _EvaluationAtTheEnd(TrainerCallback):
    """Evaluates after the last update, whatever `eval_strategy` says."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_evaluate = control.should_evaluate or state.global_step >= state.max_steps


class DiffusersTrainer(StreamTrainerMixin, Trainer):
    """Trains networks of diffusers: a base class for [`PixelDecoderTrainer`] and [`AutoencoderTrainer`].

    Unlike with plain `Trainer`,
    - the averaged weights are what is validated and saved;
    - several processes train what one with a larger batch would, up to rounding, also at the end of an epoch;
    - a loss or gradient that is not finite stops the run before it spoils the weights;
    - a run does not start on top of another one, and is resumed with the same data and settings only.

    Args:
        networks: Their parameters that require gradients are trained. Called with what `prepare` returns, they give a
            dictionary with the scalar `loss`, the mean over the batch, and maybe other scalars to log.
        args: Options.
        train_dataset: Samples, with `set_epoch` if they depend on it, as those of [`TrainingDataset`] do, or a
            [`StreamedTrainingDataset`].
        data_collator: Makes batches of them.
        eval_dataset: Samples to validate with.
        frozen: Networks that take part, but are not trained.
        callbacks: Further callbacks.

    Raises:
        ValueError: If the networks would have to be sharded, or shared by several GPUs of one process.
    """

    eval_metric = "loss"
    """What `score` returns."""

    # `Trainer` declares them for any options, model and dataset.
    args: DiffusersTrainingArguments
    model: AveragedNetworks
    train_dataset: Any
    eval_dataset: Sequence[Mapping[str, Any]] | None
    data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]
    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        networks: nn.Module,
        args: DiffusersTrainingArguments,
        train_dataset: Any,
        data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
        eval_dataset: Sequence[Mapping[str, Any]] = (),
        frozen: Sequence[nn.Module] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"One process cannot train on {args.n_gpu} GPUs here. Start one for each with `accelerate launch`, or "
                "choose a GPU with CUDA_VISIBLE_DEVICES."
            )
        rows = list(eval_dataset)
        own_callbacks = [EpochCallback(), CheckpointCallback(), AveragingCallback()]
        super().__init__(
            model=AveragedNetworks(networks, args.ema_decay if args.use_ema else None),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=rows or None,
            data_collator=data_collator,
            callbacks=[*own_callbacks, *([_EvaluationAtTheEnd()] if rows else []), *callbacks],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"Sharding is not for this training: {_NOT_HERE['fsdp']}. Start it without.")
        for module in frozen:
            module.to(args.device)
        self._sums: dict[str, Any] = {}  # of scalars, since the last line of the log
        self._num_summed = 0

    # What the subclasses do.

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the frozen networks make of a batch: arguments of the trained ones."""
        raise NotImplementedError

    def score(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The number `eval_metric` of every sample, `[batch]`."""
        raise NotImplementedError

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> PIL.Image.Image:
        """A picture to look at, of the first samples to validate with."""
        raise NotImplementedError

    def save_networks(self, folder: Path) -> None:
        """Saves the result of a training, for `from_pretrained`."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, for the optimizer."""
        return [{"params": list(self.model.trained)}]

    # What `Trainer` calls.

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the order of [`UpdateSampler`], or those of a stream."""
        args = self.args
        if isinstance(self.train_dataset, StreamedTrainingDataset):
            return super().get_train_dataloader()
        data_loader = DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            sampler=UpdateSampler(len(self.train_dataset), self._update_size, args.seed),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(data_loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimizer with the groups of `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(
                self.args,
                self.model,  # type: ignore[arg-type]  # any module does
            )
            groups = [{"weight_decay": self.args.weight_decay, **group} for group in self.parameter_groups()]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; other scalars are remembered for the log."""
        outputs = model(**self.prepare(inputs))
        for name, value in outputs.items():
            if value.ndim == 0 and name != "loss":
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._num_summed += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward.

        Raises:
            FloatingPointError: If loss or gradient are not finite.
        """
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._require_finite(loss.item(), "loss")
            if self.accelerator.scaler is None:  # which skips updates whose gradient is not finite, by design
                gradients = [value.grad for value in self.model.trained if value.grad is not None]
                self._require_finite(torch.nn.utils.get_total_norm(gradients).item(), "grad_norm")
        return loss

    def _require_finite(self, value: float, name: str) -> None:
        require_finite(value, name, self.state.global_step + 1, str(self.args.output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs numbers; beside the loss all other scalars, as means of the same updates."""
        if "loss" in logs and self._sums:
            means = {name: value / self._num_summed for name, value in self._sums.items()}
            self._sums, self._num_summed = {}, 0
            logs |= {name: value.item() for name, value in self.accelerator.reduce(means, reduction="mean").items()}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(  # type: ignore[override]  # samples instead of a dataset
        self,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Scores the averaged weights, every process a share of the samples; the main process draws a picture.

        Returns:
            The mean over the samples, logged as well.

        Raises:
            ValueError: If there are no samples.
        """
        rows = list(self.eval_dataset or ()) if eval_dataset is None else list(eval_dataset)
        if not rows:
            raise ValueError("There are no samples to validate with: pass an `eval_dataset`.")
        self.model.eval()
        with self.model.averaged():
            own = rows[self.args.process_index :: self.args.world_size]
            total = torch.tensor(sum(self.score(batch).sum().item() for batch in self.eval_batches(own)) + 0.0)
            total = self.accelerator.reduce(total.to(self.args.device), reduction="sum")
            shown = rows[: self.args.num_validation_images]
            image = self.draw(shown) if shown and self.is_world_process_zero() else None
        metrics = {f"{metric_key_prefix}_{self.eval_metric}": total.item() / len(rows)}
        self.log(dict(metrics))
        if image is not None:
            self.show(image)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def eval_batches(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of samples to validate with, on the device."""
        size = self.args.eval_batch_size
        for start in range(0, len(rows), size):
            # Rows of which nobody says the epoch would have that of the training, and other noise in each.
            batch = self.data_collator([{"epoch": 0, **row} for row in rows[start : start + size]])
            yield {name: value.to(self.args.device) for name, value in batch.items()}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. In the end the networks have their averaged weights.

        Args:
            resume_from_checkpoint: A checkpoint's directory; `"latest"` (or true) for the last complete one of
                `output_dir`, if there is one.
            args: As in `Trainer`.
            kwargs: As in `Trainer`.

        Raises:
            FileExistsError: If `output_dir` has checkpoints and none is to be resumed from.
            FloatingPointError: If the loss or the gradient is not finite.
            ValueError: If the checkpoint belongs to a run with other data or settings, is broken, or holds more than
                data.
        """
        folder = self._output_dir
        name = LATEST if resume_from_checkpoint is True else resume_from_checkpoint or None
        checkpoint = find_trainer_checkpoint(name, folder)
        if checkpoint is not None:
            self.require_same_run(Path(checkpoint))  # whatever `ignore_data_skip` says: see the class
        else:  # before anything is cleaned up there
            require_no_run(folder)
        try:
            return super().train(checkpoint, *args, **kwargs)
        except BaseException:  # on a full disk nothing should lie around that is of no use
            if self.is_world_process_zero():
                remove_incomplete_checkpoints(folder)
            raise

    def train_and_save(self) -> Self:
        """Trains, from `args.resume_from_checkpoint` if there is one, and saves the result to `args.output_dir`."""
        self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        self.save_model()
        self.save_state()
        return self

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves the result of the training; while it is running, what a resumed run needs."""
        if self.is_in_train:
            super().save_model(output_dir, *args, **kwargs)
            return
        if self.is_world_process_zero():
            self.model.eval()
            self.save_networks(Path(output_dir or self._output_dir))
        self.accelerator.wait_for_everyone()

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # `TrainingArguments` has a default
        return Path(self.args.output_dir)

    @property
    def _update_size(self) -> int:
        return self.get_total_train_batch_size(self.args)

    @property
    def run_settings(self) -> dict[str, Any]:
        """What a checkpoint has to share with a run that goes on from it."""
        return {
            **super().run_settings,
            "trained_parameters": sum(value.numel() for value in self.model.trained),
            "use_ema": self.args.use_ema,
        }

    def require_same_run(self, checkpoint: Path, other_samples: bool = False) -> None:
        """Checks that what follows in a checkpoint's run would follow here.

        Args:
            checkpoint: Directory of the checkpoint.
            other_samples: As in [`ResumableTrainerMixin`].

        Raises:
            ValueError: Something else would, or a file is missing or damaged.
        """
        missing = [name for name in _STATES if not (checkpoint / name).is_file()]
        if not any(checkpoint.glob("rng_state*.pth")):  # one for each process of before
            missing.append("rng_state.pth")
        if missing:
            raise ValueError(f"{checkpoint} has no {missing[0]}. Resume from another checkpoint of this training.")
        super().require_same_run(checkpoint, other_samples)

    def show(self, image: PIL.Image.Image) -> None:
        """Saves a validation image, and shows it to the trackers that take images."""
        show_picture(image, self._output_dir, self.state.global_step, self.callback_handler.callbacks)


class AveragedNetworks(nn.Module):
    """Networks with the exponential moving average of what is trained in them.

    The average is part of this module, so that whatever saves and restores the module (`Trainer`, say) has weights and
    average in one file. It follows the weights closely at first: after n updates the decay is at most
    (1 + n) / (10 + n), as that of `EMAModel` of diffusers.

    Args:
        networks: Their parameters that require gradients are averaged.
        decay: Decay of the average; `None` for no average.
    """

    def __init__(self, networks: nn.Module, decay: float | None) -> None:
        super().__init__()
        self.networks: Any = networks
        self.average: AveragedModel | None = None
        if decay is not None:
            self.average = AveragedModel(self.trained, multi_avg_fn=_warm_average(decay)).requires_grad_(False)

    @property
    def trained(self) -> nn.ParameterList:
        """The trained parameters of the networks, in their order."""
        return nn.ParameterList(value for value in self.networks.parameters() if value.requires_grad)

    def forward(self, **inputs: Any) -> Any:
        """Calls the networks."""
        return self.networks(**inputs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Saves memory at the cost of time; `Trainer` calls this.

        Raises:
            ValueError: If options are given: networks of diffusers have none.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError("`gradient_checkpointing_kwargs` do nothing here; leave them out.")
        self.networks.enable_gradient_checkpointing()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """What older versions of transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def update_average(self) -> None:
        """Moves the average towards the weights of now."""
        if self.average is not None:
            self.average.update_parameters(self.trained)

    def use_average(self) -> None:
        """Gives the networks their averaged weights, if there have been updates to average."""
        if self.average is not None and self.average.n_averaged > 0:
            self._set_weights(self.average.module.parameters())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the networks their averaged weights for the time of the body."""
        before = [] if self.average is None else [value.detach().clone() for value in self.trained]
        self.use_average()
        try:
            yield
        finally:
            if before:
                self._set_weights(before)

    @torch.no_grad()
    def _set_weights(self, values: Iterable[torch.Tensor]) -> None:
        for weight, value in zip(self.trained, values, strict=True):
            weight.copy_(value)


class AveragingCallback(TrainerCallback):
    """Keeps the average of [`AveragedNetworks`], whose networks have it as their weights in the end."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not kwargs["optimizer"].step_was_skipped:  # as fp16 does where a gradient overflows
            kwargs["model"].update_average()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].use_average()


def _warm_average(decay: float) -> Any:
    def update(averages: Any, values: Any, num_averaged: Any) -> None:
        number = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averages, values, num_averaged)

    return update
