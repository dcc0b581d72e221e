"""An average of the weights over time, which draws better than the weights of the last update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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


__all__ = ["AveragedNetworks", "AveragingCallback"]
