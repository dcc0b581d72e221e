"""Trains a small vision encoder on scenes: what LaVIT takes from EVA-CLIP, this one learns from labels of patches.

    python examples/worlds/train_vision_encoder.py --vision_config examples/lavit_scenes/vision_encoder.json \
        --output_dir out/lavit-scenes/vision_encoder --max_steps 2000

`--config FILE.yaml` takes options from a file, `--help` lists them.

From the features of every patch, linear layers (thrown away afterwards) have to tell what the object there is, its
size and place, the place of the patch, and to paint it again. Of the patches that become tokens nothing but their
features tells a language model where they were. Half of the pictures are shown in looks that no scene has, such as
other colors, so that shapes are learned apart from colors: pairs of both that are held out, and are never shown here,
need that. With `--contrastive_weight`, pictures and captions have to find each other, too.
`--output_dir` gets the encoder, for `train_tokenizer.py --vision_model`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

from lavit_hf import LavitImageProcessorPil
from lavit_hf.data.scenes import PortableRng
from lavit_hf.data.worlds import IGNORED, World, find_world
from lavit_hf.training import (
    CheckpointCallback,
    FiniteGradientsCallback,
    build_vision_model,
    exit_on_write_errors,
    find_trainer_checkpoint,
    parse_script_arguments,
    sample_uniform,
)

_CAPTION = 3000  # the third key of these random choices; scenes have four keys
_NUM_TEXTS = 3000  # scenes whose texts have all words
_SHARED = 64  # width of what pictures and captions are compared in
_TRAINED = "with_heads.safetensors"  # the encoder and the layers that read its features


@dataclass
class EncoderArguments:
    """What to train."""

    vision_config: str = field(metadata={"help": "A JSON file with `model_type` and sizes of the encoder."})
    world: str = field(default="scenes", metadata={"help": "What the pictures are of: scenes or emoji."})
    num_scenes: int = field(default=40_000, metadata={"help": "How many scenes to train on."})
    num_eval_scenes: int = field(
        default=500, metadata={"help": "How many scenes to evaluate on, of each other split."}
    )
    repaint_probability: float = field(default=0.5, metadata={"help": "How often a picture gets other looks."})
    position_weight: float = field(default=0.0, metadata={"help": "Weight of telling where a patch is."})
    contrastive_weight: float = field(
        default=0.0, metadata={"help": "Weight of telling which caption of the batch is a picture's."}
    )
    init_from: str | None = field(default=None, metadata={"help": "A directory of this script, to go on from."})


@dataclass
class EncoderTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warmup, or below 1 their share."})
    weight_decay: float = field(default=0.02, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pictures per batch."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Pictures per batch of evaluation."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two reports."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: labels have names of their own."})


class LabeledScenes(Dataset):
    """Pictures with labels of their patches and a caption, made when they are read, a batch at once.

    Args:
        world: What they are of.
        split: One of its splits.
        num_scenes: How many.
        patches_per_side: Patches across and down.
        repaint_probability: How often a picture gets looks that no scene has, such as other colors.
    """

    def __init__(
        self, world: World, split: str, num_scenes: int, patches_per_side: int, repaint_probability: float = 0.0
    ) -> None:
        self.world, self.split, self.num_scenes = world, split, num_scenes
        self.patches_per_side, self.repaint_probability = patches_per_side, repaint_probability

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        is_varied = [sample_uniform(0, 0, index, "repaint") < self.repaint_probability for index in indices]
        made = self.world.labeled_pictures(
            self.split, 0, np.array(indices), self.patches_per_side, np.array(is_varied)
        )
        return [
            {
                "image": made.pixels[row],
                "caption": self.world.write_caption(made.scenes[row], PortableRng(0, index, _CAPTION)),
                "offset": torch.tensor(made.offset[row]).float(),
                "is_object": torch.tensor(made.is_object[row]),
                **{name: torch.tensor(labels[row]) for name, labels in made.classes.items()},
            }
            for row, index in enumerate(indices)
        ]


class LabeledSceneCollator:
    """Batches of pictures as the encoder takes them, of labels, and of how often captions have each word."""

    def __init__(self, image_processor: LavitImageProcessorPil, words: Sequence[str]) -> None:
        self.image_processor = image_processor
        self.numbers = {word: number for number, word in enumerate(words)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ("image", "caption")
        }
        words = torch.zeros(len(rows), len(self.numbers))
        for counts, row in zip(words, rows, strict=True):
            for word in split_words(row["caption"]):
                counts[self.numbers[word]] += 1
        images = [row["image"] for row in rows]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch | {"pixel_values": pixel_values, "words": words}


def split_words(text: str) -> list[str]:
    """Words of a caption or a question."""
    return re.findall(r"[\w-]+", text.lower())


class VisionEncoderForScenes(nn.Module):
    """A vision encoder and the linear layers that read its features.

    Args:
        vision_model: A vision transformer that returns its raw residual stream.
        classes: How many classes each kind of label has.
        num_words: How many words captions are made of.
        position_weight: Weight of telling the row and the column of a patch.
        contrastive_weight: Weight of telling which caption is a picture's.
    """

    def __init__(
        self,
        vision_model: Any,
        classes: Mapping[str, int],
        num_words: int,
        position_weight: float = 0.0,
        contrastive_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.contrastive_weight = contrastive_weight
        self.position_weight = position_weight
        self.vision_model = vision_model
        config = vision_model.config
        self.patch_size = config.patch_size
        self.classes = dict(classes)
        self.side = config.image_size // config.patch_size
        self.num_outputs = [*self.classes.values(), 2, 3 * self.patch_size**2, self.side, self.side]
        self.head = nn.Linear(config.hidden_size, sum(self.num_outputs))
        self.image_projection = nn.Linear(config.hidden_size, _SHARED, bias=False)
        self.word_projection = nn.Linear(num_words, _SHARED, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP starts

    def forward(
        self,
        pixel_values: torch.Tensor,
        offset: torch.Tensor,
        is_object: torch.Tensor,
        words: torch.Tensor,
        **labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: Preprocessed pictures, `[batch, 3, height, width]`.
            offset: Where the object's middle is, `[batch, num_patches, 2]`.
            is_object: Where there is one, `[batch, num_patches]`.
            words: How often the captions have each word, `[batch, words]`.
            labels: Of each kind, `[batch, num_patches]`; -100 where it cannot be seen.

        Returns:
            The loss, and which of the patches' classes were found, `[batch, num_patches]` each.
        """
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        outputs = self.head(F.layer_norm(features, features.shape[-1:])).split(self.num_outputs, dim=-1)
        *logits, place, pixels, row, column = outputs
        loss = F.mse_loss(pixels, self.patches(pixel_values))
        loss = loss + self.position_weight * self.position_loss(row, column)
        loss = loss + 4 * (F.smooth_l1_loss(place, offset, reduction="none", beta=0.1) * is_object[..., None]).mean()
        if self.contrastive_weight:
            # Captions say what looks may hide.
            is_told = torch.stack([(its != IGNORED).all(dim=1) for its in labels.values()]).all(dim=0)
            loss = loss + self.contrastive_weight * self.contrastive_loss(features[is_told], words[is_told])
        found = {}
        for values, name in zip(logits, self.classes, strict=True):
            target = labels[name]
            loss = loss + self.label_loss(values, target, is_object)
            found[name] = values.argmax(dim=-1)
        return {"loss": loss, **found}

    def label_loss(self, scores: torch.Tensor, target: torch.Tensor, is_object: torch.Tensor) -> torch.Tensor:
        """How well scores, `[batch, num_patches, classes]`, tell labels; objects count as much as all else."""
        errors = F.cross_entropy(scores.transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
        loss = errors.new_zeros(())
        for patches in (is_object, ~is_object):
            is_told = patches & (target != IGNORED)
            loss = loss + errors[is_told].sum() / is_told.sum().clamp_min(1)
        return loss

    def contrastive_loss(self, features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """How well pictures and captions, as bags of words, find each other in the batch, as CLIP learns it.

        Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
        """
        if not len(features):
            return features.sum()
        images = F.normalize(self.image_projection(F.layer_norm(features, features.shape[-1:]).mean(dim=1)), dim=-1)
        captions = F.normalize(self.word_projection(words), dim=-1)
        logits = self.logit_scale.clamp(max=math.log(100)).exp() * images @ captions.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def position_loss(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """How well scores of rows and columns, `[batch, num_patches, side]` each, tell where patches are."""
        number = torch.arange(self.side**2, device=row.device).expand(len(row), -1)
        losses = [
            F.cross_entropy(scores.transpose(1, 2), target)
            for scores, target in ((row, number // self.side), (column, number % self.side))
        ]
        return losses[0] + losses[1]

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of every patch, `[batch, num_patches, 3 * patch_size ** 2]`."""
        return F.unfold(pixel_values, self.patch_size, stride=self.patch_size).transpose(1, 2)


def accuracies(prediction: Any, classes: Mapping[str, int]) -> dict[str, float]:
    """How often the labels of patches with an object are found."""
    is_object, *labels = prediction.label_ids
    return {
        name: float((found == label)[is_object].mean())
        for name, found, label in zip(classes, prediction.predictions, labels, strict=True)
    }


def complete_model(vision_model: Any) -> Any:
    """The encoder with its last normalization, which LaVIT leaves out, but which `from_pretrained` expects."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what was not trained, such as a pooler, is the same in every run
        complete = type(vision_model)(vision_model.config)
    complete.load_state_dict({**complete.state_dict(), **vision_model.state_dict()})
    return complete


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains; returns the trainer."""
    encoder_args, args = parse_script_arguments((EncoderArguments, EncoderTrainingArguments), arguments, __doc__)
    if args.label_smoothing_factor:
        raise SystemExit("--label_smoothing_factor does nothing here: Trainer smooths labels of one kind only.")
    checkpoint = find_trainer_checkpoint(args.resume_from_checkpoint, args.output_dir)
    torch.manual_seed(args.seed)
    world = find_world(encoder_args.world)
    args.label_names = ["is_object", *world.label_classes]
    config = AutoConfig.for_model(**json.loads(Path(encoder_args.vision_config).read_text(encoding="utf-8")))
    side = config.image_size // config.patch_size
    image_processor = LavitImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    words = sorted({word for text in world.make_texts(_NUM_TEXTS) for word in split_words(text)})
    evaluated = {split: LabeledScenes(world, split, encoder_args.num_eval_scenes, side) for split in world.splits[1:]}
    model = VisionEncoderForScenes(
        build_vision_model(config),
        world.label_classes,
        len(words),
        encoder_args.position_weight,
        encoder_args.contrastive_weight,
    )
    if encoder_args.init_from is not None:
        model.load_state_dict(load_file(Path(encoder_args.init_from) / _TRAINED))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=LabeledScenes(
            world, world.splits[0], encoder_args.num_scenes, side, encoder_args.repaint_probability
        ),
        eval_dataset=evaluated,
        data_collator=LabeledSceneCollator(image_processor, words),
        compute_metrics=functools.partial(accuracies, classes=world.label_classes),
        callbacks=[CheckpointCallback(), FiniteGradientsCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        complete_model(trainer.model.vision_model).save_pretrained(args.output_dir)
        save_file(trainer.model.state_dict(), Path(args.output_dir) / _TRAINED)
        image_processor.save_pretrained(args.output_dir)
    return trainer


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
