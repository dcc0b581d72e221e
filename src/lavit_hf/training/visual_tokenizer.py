"""Stage 1: a visual tokenizer learns to reconstruct what a vision encoder sees. Its batches, and what to watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..modeling.configuration_lavit import LavitPreTrainingConfig
from ..modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from ..utils.distributed import is_sharded
from ..utils.seeds import sample_seed
from .dataset import FollowsEpoch, complete_row
from .streaming import StreamTrainer

logger = logging.get_logger(__name__)


class VisualTokenizerDataCollator(FollowsEpoch):
    """Makes batches for [`LavitVisualTokenizerForPreTraining`]; `Trainer` needs `remove_unused_columns=False` for it.

    Args:
        image_processor: Prepares the images, such as a [`LavitImageProcessor`] or that of the vision encoder.
        seed: Seed of the training. With a row's epoch and sample id it decides which noise an image gets.
    """

    def __init__(self, image_processor: Any, seed: int = 0):
        super().__init__()
        self.image_processor = image_processor
        self.seed = seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Rows of a [`TrainingDataset`], each with one image or several, or of any dataset with a column
                `image`, and maybe `target_image`. The latter are numbered by their content, and get their epoch from
                [`EpochCallback`].

        Returns:
            `pixel_values` `[images, channels, height, width]` and `sample_seeds` `[images]`; and
            `target_pixel_values`, in the shape of `pixel_values`, if rows say what is to be rebuilt.

        Raises:
            ValueError: If a row has no image, or if some rows have targets and others have none.
        """
        images: list[Any] = []
        targets: list[Any] = []
        seeds = []
        for row in (complete_row(row, self.epoch) for row in rows):
            if not row.get("images"):
                raise ValueError(
                    f"Sample {row['sample_id']} has no image to learn from. Give the dataset's image column to "
                    "TrainingDataset, and leave out rows of text alone."
                )
            for index, image in enumerate(row["images"]):
                images.append(image)
                seeds.append(sample_seed(self.seed, row["epoch"], row["sample_id"], f"gumbel/{index}"))
            targets += row.get("target_images") or []
        pixel_values = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        batch = {"pixel_values": pixel_values, "sample_seeds": torch.tensor(seeds)}
        if targets:
            if len(targets) != len(images):
                raise ValueError(
                    f"A batch of {len(images)} images has {len(targets)} target images: either all rows need them, or "
                    "none. For a row that is its own target, give its image twice."
                )
            batch["target_pixel_values"] = self.image_processor(images=targets, return_tensors="pt")["pixel_values"]
        return batch


# Where phases of a training end.
_PHASES = ("bypass_merger_steps", "selector_steps", "calibration_steps", "quantize_after_steps")


class VisualTokenizerTrainer(StreamTrainer):
    """[`StreamTrainer`] for a model that counts its forward passes.

    A resumed run has as many of them in an update, and the same phases, whatever data follow.
    """

    model: LavitVisualTokenizerForPreTraining

    @property
    def run_settings(self) -> dict[str, Any]:
        """What a checkpoint has to share with a run that goes on from it."""
        return {
            **super().run_settings,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            **{name: getattr(self.model.config, name) for name in _PHASES},
        }

    def explain_changes(self, changed: list[str]) -> list[str]:
        """What else to say about settings that a checkpoint does not share."""
        hints = super().explain_changes(changed)
        if set(changed) & set(_PHASES):  # or the selector would be calibrated once more, say
            hints.append(
                "Phases have to end where they did, in forward passes; those that are shares follow from all updates: "
                "resume with the same --max_steps (or epochs) and gradient_accumulation_steps."
            )
        return hints


_ON_FAILURE = ("warn", "raise", "ignore")


class VisualTokenizerCallback(TrainerCallback):
    """Adds the metrics of [`TokenizerMetrics`] to every log, of training and evaluation, and looks for failures.

    A run has failed if in several logs in a row, or in the last one, when training ends,
    - the argmax of the selector keeps nothing in many images, however healthy the sampled `keep_rate` looks: a model
      would see no tokens at all;
    - the selector, its learning over, gives all patches the same probability;
    - few of the codes are used (once there are codes).

    [`~VisualTokenizerCallback.attach`] puts it before the callbacks that write logs to files and services; in
    `Trainer(callbacks=[...])` it would come after them, and only `log_history` and the console would have the metrics.

    Args:
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        patience: Logs in a row that must show a failure.
        max_empty_images: Share of images without a token that is still fine.
        min_spread: Standard deviation of the probability to keep over patches that is still fine.
        min_live_codes: Share of the codes (or of the tokens, if there were fewer) that have to be in use.

    Raises:
        ValueError: If `on_failure` is none of these.
    """

    def __init__(
        self,
        on_failure: str = "warn",
        patience: int = 3,
        max_empty_images: float = 0.25,
        min_spread: float = 0.01,
        min_live_codes: float = 0.25,
    ):
        if on_failure not in _ON_FAILURE:
            raise ValueError(f"`on_failure` must be one of {_ON_FAILURE}, got {on_failure!r}.")
        self.on_failure = on_failure
        self.patience = patience
        self.max_empty_images = max_empty_images
        self.min_spread = min_spread
        self.min_live_codes = min_live_codes
        # Of the last log: how many in a row have shown a failure, what to say about it, and what has been said.
        self._failures: dict[str, int] = {}
        self._messages: dict[str, str] = {}
        self._reported: set[str] = set()

    def attach(self, trainer: Trainer) -> VisualTokenizerCallback:
        """Makes this the first callback of `trainer`, and returns it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses weights of which a process has a part only (those of ZeRO-3 have an id)."""
        if is_sharded(kwargs["model"]):
            raise ValueError(
                "Stage 1 is not for FSDP and DeepSpeed: its codebook is counted and moved as a whole. Take a copy on "
                "each GPU (examples/accelerate/ddp.yaml)."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        model: LavitVisualTokenizerForPreTraining = kwargs["model"]
        logs = {} if logs is None else logs
        # "loss" while training, "eval_loss" or "eval_NAME_loss" after evaluation, "train_loss" at the very end.
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("loss")), "train_")
        source = model.eval_metrics if prefix else model.train_metrics
        if prefix == "train_" or source.is_empty:
            return
        metrics = source.compute()
        source.reset()
        logs.update({prefix + name: value for name, value in metrics.items()})
        state.log_history[-1].update({prefix + name: value for name, value in metrics.items()})
        self._guard(model, metrics, is_over=state.global_step >= state.max_steps > 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A short run has fewer logs than it takes patience, or none; its result counts all the same."""
        if state.global_step < state.max_steps:  # it was stopped, and goes on some other time
            return
        model: LavitVisualTokenizerForPreTraining = kwargs["model"]
        if not model.train_metrics.is_empty:
            metrics = model.train_metrics.compute()
            model.train_metrics.reset()
            self._guard(model, metrics, is_over=True)
        else:
            self._report({name: message for name, message in self._messages.items() if name not in self._reported})

    def _guard(self, model: LavitVisualTokenizerForPreTraining, metrics: dict[str, float], is_over: bool) -> None:
        found = find_failures(model, metrics, self.max_empty_images, self.min_spread, self.min_live_codes)
        self._failures = {name: self._failures.get(name, 0) + 1 for name in found}
        self._messages = found
        self._reported = {name for name in found if is_over or self._failures[name] >= self.patience}
        self._report({name: found[name] for name in found if name in self._reported})

    def _report(self, failures: dict[str, str]) -> None:
        for message in failures.values():
            if self.on_failure == "raise":
                raise RuntimeError(message)
            if self.on_failure == "warn":
                logger.warning(message)


def find_failures(
    model: LavitVisualTokenizerForPreTraining,
    metrics: dict[str, float],
    max_empty_images: float = 0.25,
    min_spread: float = 0.01,
    min_live_codes: float = 0.25,
) -> dict[str, str]:
    """Which known failures metrics show, with what can be done about them; see [`VisualTokenizerCallback`].

    While the selector learns and will be calibrated, an argmax that keeps nothing is no failure.
    """
    config, failures = model.config, {}
    steps = config.selector_steps
    will_calibrate = bool(steps and config.calibration_steps and int(model.step) <= steps + config.calibration_steps)
    if not will_calibrate and metrics["argmax_empty_images"] > max_empty_images:
        failures["empty"] = (
            f"The selector's argmax keeps nothing in {metrics['argmax_empty_images']:.0%} of the images, although "
            f"{metrics['keep_rate']:.0%} of the patches were kept in training. Inference would see no tokens. "
            + _how_to_fill_images(config)
        )
    if not will_calibrate and metrics["keep_probability_spread"] < min_spread:
        failures["flat"] = (
            "The selector gives all patches the same probability to be kept (standard deviation "
            f"{metrics['keep_probability_spread']:.4f}): it has learned nothing. Bypass the merger for longer."
        )
    if "live_codes" in metrics:
        possible = min(config.visual_tokenizer_config.codebook_size, metrics["used_tokens"])
        if metrics["live_codes"] < min_live_codes * possible:
            failures["collapse"] = (
                f"Only {metrics['live_codes']} of {possible} possible codes are in use (perplexity "
                f"{metrics['perplexity']:.0f}): the codebook has collapsed. Start it from k-means, after some steps "
                "without quantization, and revive codes."
            )
    return failures


def _how_to_fill_images(config: LavitPreTrainingConfig) -> str:
    if config.selector_steps == 0:
        return (
            "It does not learn in this run (selector_steps=0): train another one, with keep_rate_per_image=True and a "
            "large keep_rate_weight, such as 100, or a higher keep_rate."
        )
    if not (config.selector_steps and config.calibration_steps and config.bypass_merger_steps):
        return "Start with bypass_merger_steps and selector_steps."
    # The selector has been calibrated: enough is kept of all images together, but not of each.
    if config.keep_rate_per_image:
        return f"Raise keep_rate_weight (now {config.keep_rate_weight:g}) or keep_rate (now {config.keep_rate:.2f})."
    return (
        "Have every image keep its share (keep_rate_per_image=True with a large keep_rate_weight, such as 100), or "
        "raise keep_rate."
    )


__all__ = ["VisualTokenizerCallback", "VisualTokenizerDataCollator", "VisualTokenizerTrainer", "find_failures"]
