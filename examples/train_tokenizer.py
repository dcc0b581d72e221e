"""Trains a visual tokenizer and its token decoder (stage 1), around any vision encoder, on pictures alone.

    python examples/train_tokenizer.py --vision_model google/siglip-base-patch16-224 --dataset path/to/images \
        --output_dir out/tokenizer --num_train_epochs 1 --per_device_train_batch_size 64 --bf16

A row of the dataset has an image (or a list of images). With a whole LaVIT, or a visual tokenizer that was trained
before, as `--vision_model`, its training goes on; `--from_scratch` takes only its vision encoder. `--output_dir` gets
`visual_tokenizer` (for `train_lm.py`) and `token_decoder` (for `train_pixel_decoder.py`), and checkpoints to
`--resume_from_checkpoint`. On several devices: `accelerate launch examples/train_tokenizer.py ...`. `--config
FILE.yaml` takes options from a file, `--help` lists them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Trainer, TrainingArguments

from lavit_hf import LavitImageProcessorPil, LavitTokenDecoder, LavitVisualTokenizerForPreTraining
from lavit_hf.training import (
    CheckpointCallback,
    EpochCallback,
    FiniteGradientsCallback,
    StreamArguments,
    StreamedTrainingDataset,
    TrainingDataset,
    ValidationPictures,
    VisualTokenizerCallback,
    VisualTokenizerDataCollator,
    VisualTokenizerTrainer,
    build_image_processor,
    build_vision_model,
    draw_kept_patches,
    exit_on_write_errors,
    find_trainer_checkpoint,
    first_pictures,
    is_sharded_run,
    load_rows,
    load_visual_part,
    parse_script_arguments,
)

NUM_SHOWN = 8  # pictures that an evaluation shows in `validation/` and in trackers


@dataclass
class ModelArguments:
    """What to train. Sizes are for a new tokenizer; one that goes on has its own."""

    vision_model: str | None = field(
        default=None, metadata={"help": "A vision encoder, a model that has one, or a visual tokenizer to go on with."}
    )
    vision_config: str | None = field(
        default=None, metadata={"help": "Instead: a JSON file with `model_type` and sizes of an encoder, at random."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Of a LaVIT, take the vision encoder only."})
    new_codes: bool = field(
        default=False, metadata={"help": "Of a visual tokenizer, keep encoder and selector, learn the rest anew."}
    )
    token_decoder: str | None = field(default=None, metadata={"help": "Token decoder of the tokenizer that goes on."})
    selector_only: bool = field(
        default=False,
        metadata={"help": "Of a tokenizer that goes on, only the selector learns; the token decoder stays as it is."},
    )
    codebook_size: int = field(default=16384, metadata={"help": "Number of visual codes."})
    codebook_dim: int = field(default=32, metadata={"help": "Width of a code."})
    num_layers: int = field(default=12, metadata={"help": "Blocks of the merger, and of the token decoder."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of new weights."})
    cross_attention_dims: list[int] = field(
        default_factory=lambda: [768, 1280], metadata={"help": "Widths of the heads for stage 3's U-Net."}
    )
    pooled_size: int = field(default=1280, metadata={"help": "Width of the U-Net's pooled condition; 0 for none."})


@dataclass
class MethodArguments:
    """How to train. Steps are updates of the weights, or below 1 their share of all.

    The three phases are for what is new: a trained visual tokenizer goes on quantized, a selector that learns alone
    meets neither merger nor codes, and with new codes a trained selector stays as it is.
    """

    keep_rate: float = field(default=1 / 3, metadata={"help": "Share of the patches to keep."})
    keep_rate_weight: float = field(default=2.0, metadata={"help": "Weight of the distance from it."})
    keep_rate_range: list[float] | None = field(
        default=None, metadata={"help": "Keep another share of each image, drawn from between these two."}
    )
    keep_rate_per_image: bool = field(default=False, metadata={"help": "Keep that share of every image."})
    bypass_merger_steps: float = field(
        default=0.2, metadata={"help": "How long the token decoder sees kept patches as they are; 0: authors' order."}
    )
    selector_steps: float = field(
        default=0.2, metadata={"help": "How long the selector learns; then it is calibrated. Negative: to the end."}
    )
    quantize_after_steps: float = field(default=0.4, metadata={"help": "How long to train without quantization."})
    commitment_weight: float = field(default=0.1, metadata={"help": "Weight of the distance of tokens from codes."})
    revive_every_steps: int = field(default=20, metadata={"help": "Unused codes are moved that often; 0: never."})
    kmeans_tokens_per_code: int = field(default=8, metadata={"help": "Tokens for k-means, per code."})
    center_targets: bool = field(default=False, metadata={"help": "Compare features without their position's mean."})
    on_failure: str = field(default="warn", metadata={"help": "If the run fails in a known way: warn, raise, ignore."})


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "A folder of images, one of save_to_disk, a dataset's name, 'scenes' or 'emoji'."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; by default none."})
    num_eval_rows: int = field(default=2000, metadata={"help": "How many rows of it to use."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    target_image_column: str | None = field(
        default=None,
        metadata={"help": "Column of images to rebuild from codes of the others; by default the images themselves."},
    )
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes' and 'emoji': how many."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about corrupt images: skip or raise."})


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warmup, or below 1 their share."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two reports."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: the collator needs all columns."})


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains; returns the trainer."""
    model_args, method_args, data_args, stream_args, args = parse_script_arguments(
        (ModelArguments, MethodArguments, DataArguments, StreamArguments, TokenizerTrainingArguments),
        arguments,
        __doc__,
    )
    if args.label_smoothing_factor:
        raise SystemExit("--label_smoothing_factor does nothing here: stage 1 has no labels.")
    if is_sharded_run(args):
        raise SystemExit(
            "Stage 1 is not for FSDP and DeepSpeed: its codebook is counted and moved as a whole. Take a copy on each "
            "GPU (--config_file examples/accelerate/ddp.yaml)."
        )
    checkpoint = find_trainer_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True  # not every phase trains every part
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # they are equal on all processes
    torch.manual_seed(args.seed)  # for what is new
    train_dataset = load_training_data(data_args, stream_args, args)
    model = load_model(model_args, method_args, num_updates(args, train_dataset), args)
    image_processor = load_image_processor(model_args, model)
    eval_dataset = None
    if data_args.eval_split is not None:
        num_rows = data_args.num_eval_rows
        eval_dataset = load_split(data_args, data_args.eval_split, num_rows, stream_args.streaming)
    trainer = VisualTokenizerTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=VisualTokenizerDataCollator(image_processor, seed=args.seed),
        processing_class=image_processor,
        callbacks=[EpochCallback(), CheckpointCallback(), FiniteGradientsCallback()],
    )
    if eval_dataset is not None:
        pictures = first_pictures(eval_dataset, NUM_SHOWN)
        ValidationPictures(lambda shown: draw_kept_patches(shown, image_processor, pictures)).attach(trainer)
    VisualTokenizerCallback(on_failure=method_args.on_failure).attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    learns_codes = not model_args.selector_only
    save(trainer, image_processor, warns=learns_codes and method_args.on_failure != "ignore")
    if train_dataset.num_bad_samples:
        print(f"{train_dataset.num_bad_samples} samples were bad and are not trained on; see the log.")
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def num_updates(args: TrainingArguments, dataset: Any) -> int:
    """Updates of the weights in the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(len(dataset) / (args.train_batch_size * args.world_size * args.gradient_accumulation_steps))
    return math.ceil(per_epoch * args.num_train_epochs)


def load_model(
    model_args: ModelArguments, method_args: MethodArguments, updates: int, args: TrainingArguments
) -> LavitVisualTokenizerForPreTraining:
    """A new visual tokenizer around the vision encoder, or the one to go on with."""

    def forwards(steps: float) -> int:
        return round(steps * updates if steps < 1 else steps) * args.gradient_accumulation_steps

    names = ("keep_rate", "keep_rate_weight", "keep_rate_range", "keep_rate_per_image", "commitment_weight")
    names += ("revive_every_steps", "kmeans_tokens_per_code", "center_targets")
    values = {name: getattr(method_args, name) for name in names}
    values["seed"] = args.seed
    calibration_steps = max(1, min(20, updates // 20)) * args.gradient_accumulation_steps
    part = load_vision_part(model_args)
    is_trained = part.config.model_type == "lavit_visual_tokenizer"
    if model_args.new_codes and not is_trained:
        raise SystemExit("--new_codes is for a --vision_model that is a visual tokenizer.")
    selector = part.discrete.selector if model_args.new_codes else None
    if is_trained and selector is None:
        decoder = model_args.token_decoder and LavitTokenDecoder.from_pretrained(model_args.token_decoder)
        if model_args.selector_only:
            if decoder is None:
                raise SystemExit("--selector_only needs the --token_decoder that was trained with the tokenizer.")
            steps = forwards(method_args.selector_steps)
            if not 0 <= steps < forwards(updates) - calibration_steps:
                raise SystemExit(
                    f"The selector learns for {steps} steps and is then calibrated for {calibration_steps}, which "
                    f"does not fit into {forwards(updates)}: raise --max_steps or lower --selector_steps."
                )
            # What a patch tells is what its own features tell: they are neither merged nor quantized here.
            values |= {"bypass_merger_steps": forwards(updates) + 1, "quantize_after_steps": forwards(updates) + 1}
            values |= {"selector_steps": steps, "calibration_steps": calibration_steps}
        model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
            vision_model=part, token_decoder=decoder or None, **values
        )
        if model_args.selector_only:
            model.requires_grad_(False)
            model.visual_tokenizer.discrete.selector.requires_grad_(True)
        return model
    if model_args.selector_only:
        raise SystemExit("--selector_only is for a --vision_model that is a visual tokenizer, without --new_codes.")
    if model_args.token_decoder is not None:
        raise SystemExit(
            "--token_decoder is for a --vision_model that is a visual tokenizer, without --from_scratch and "
            "--new_codes: a new one learns with a new token decoder."
        )
    new = {"codebook_size": model_args.codebook_size, "codebook_dim": model_args.codebook_dim}
    common = {"initializer_range": model_args.initializer_range}
    selector_steps = 0 if selector is not None else method_args.selector_steps
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
        vision_model=part if selector is None else part.vision_model,
        visual_tokenizer_config={**new, **common, "merger_num_layers": model_args.num_layers},
        token_decoder_config={
            **common,
            "cross_attention_dims": model_args.cross_attention_dims,
            "pooled_size": model_args.pooled_size or None,
        },
        bypass_merger_steps=forwards(method_args.bypass_merger_steps),
        selector_steps=None if selector_steps < 0 else forwards(selector_steps),
        calibration_steps=calibration_steps,
        quantize_after_steps=forwards(method_args.quantize_after_steps),
        **values,
    )
    if selector is not None:
        model.visual_tokenizer.discrete.selector.load_state_dict(selector.state_dict())
    return model


def load_vision_part(model_args: ModelArguments) -> Any:
    """The vision encoder, or the visual tokenizer that has one."""
    if (model_args.vision_model is None) == (model_args.vision_config is None):
        raise SystemExit("Give either --vision_model or --vision_config.")
    if model_args.vision_config is not None:
        values = json.loads(Path(model_args.vision_config).read_text(encoding="utf-8"))
        return build_vision_model(AutoConfig.for_model(**values))
    part = load_visual_part(model_args.vision_model)
    return part.vision_model if model_args.from_scratch and hasattr(part, "vision_model") else part


def load_image_processor(
    model_args: ModelArguments, model: LavitVisualTokenizerForPreTraining
) -> LavitImageProcessorPil:
    """Prepares images as the vision encoder knows them; one at random has no preference."""
    source = LavitImageProcessorPil() if model_args.vision_model is None else model_args.vision_model
    return build_image_processor(source, model.config)


def load_training_data(
    data_args: DataArguments, stream_args: StreamArguments, args: TrainingArguments
) -> TrainingDataset | StreamedTrainingDataset:
    """What to train on: a dataset, or what is read while training goes on."""
    if not stream_args.is_used:
        return load_split(data_args, data_args.train_split)
    if data_args.target_image_column is not None:
        raise SystemExit("--target_image_column is for datasets that are not streamed.")
    columns = (data_args.image_column, None)
    options = {"on_bad_sample": data_args.on_bad_sample, "num_scenes": data_args.num_scenes}
    return stream_args.load(args, data_args.dataset, data_args.train_split, *columns, **options)


def load_split(
    data_args: DataArguments, split: str, num_rows: int | None = None, streaming: bool = False
) -> TrainingDataset:
    """A split of the dataset, or its first rows."""
    if data_args.dataset is None:
        raise SystemExit("Name the data: --dataset.")
    options = {"num_rows": num_rows, "streaming": streaming, "num_scenes": data_args.num_scenes}
    rows, root = load_rows(data_args.dataset, split, **options)
    columns = {"image_column": data_args.image_column, "target_image_column": data_args.target_image_column}
    return TrainingDataset(rows, **columns, text_column=None, on_bad_sample=data_args.on_bad_sample, image_root=root)


def save(trainer: Trainer, image_processor: LavitImageProcessorPil, warns: bool) -> None:
    """Saves the whole, to go on from, and its two parts, for the other stages."""
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.model
    if warns and model.phase != "quantized":
        print(
            f"Training ended in phase {model.phase!r}: the codes mean nothing yet. Train longer, or quantize earlier."
        )
    folder = Path(trainer.args.output_dir)
    model.visual_tokenizer.save_pretrained(folder / "visual_tokenizer")
    image_processor.save_pretrained(folder / "visual_tokenizer")
    model.token_decoder.save_pretrained(folder / "token_decoder")


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
