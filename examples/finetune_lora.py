"""Fine-tunes a LaVIT with LoRA on images and texts: captions, questions and answers, drawing, or all of these.

    python examples/finetune_lora.py --model path/to/lavit --dataset path/to/data --output_dir out/lora \
        --num_train_epochs 3 --per_device_train_batch_size 8 --bf16

A row of the dataset has an image (or a list of images) and a text; columns `prompt` (such as "Question: What is this?
Answer:", which is how `lavit ask` asks) and `messages` are used if there are any. On several devices: `accelerate
launch examples/finetune_lora.py ...`, to shard the model `accelerate launch --config_file
examples/accelerate/fsdp2.yaml ...`. `--config FILE.yaml` takes options
from a file, `--help` lists them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training import (
    CheckpointCallback,
    EpochCallback,
    FiniteGradientsCallback,
    LanguageModelingLoss,
    LavitDataCollator,
    StreamArguments,
    StreamedTrainingDataset,
    StreamTrainer,
    TrainingDataset,
    ValidationPictures,
    draw_captions,
    exit_on_write_errors,
    find_trainer_checkpoint,
    first_pictures,
    get_lora_config,
    is_sharded_run,
    load_rows,
    merge_adapter,
    parse_script_arguments,
    save_adapter_card,
    upcast_trained_weights,
)

NUM_SHOWN = 8  # pictures that an evaluation shows in `validation/` and in trackers


@dataclass
class ModelArguments:
    """What to adapt, and how much."""

    model: str = field(metadata={"help": "A LaVIT: a directory or a repository of the Hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "dtype of the frozen weights; by default as stored, on a CPU float32."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen language model in 4 bits, by bitsandbytes."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, times their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    train_embeddings: bool = field(
        default=True,
        metadata={"help": "Also train embeddings and head. Needed if the visual ids are new, costly on large models."},
    )
    merge_to: str | None = field(default=None, metadata={"help": "Also save the merged model, to a new directory."})


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A folder of images with a metadata.jsonl, one of Dataset.save_to_disk, the name of a dataset, or "
            "'scenes' or 'emoji'. Instead: --mixture."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to compute the loss on; by default none."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    text_column: str = field(default="text", metadata={"help": "Column of the text to learn."})
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes' and 'emoji': how many."})
    num_eval_rows: int = field(default=200, metadata={"help": "How many rows of the evaluation split to use."})
    image_first_probability: float = field(
        default=0.5, metadata={"help": "How often an image is read and its text learned; otherwise it is drawn."}
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "How often an image is drawn without its text."})
    keep_rate_range: list[float] | None = field(
        default=None,
        metadata={"help": "Two numbers: images that are read become shares of their patches drawn from between them."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Longer rows lose text."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about bad samples: skip or raise."})


@dataclass
class LoraTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warmup, or below 1 their share."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two reports."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: the collator needs all columns."})
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from state that is loaded with all the code in it, as that of DeepSpeed is."},
    )


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains; returns the trainer."""
    model_args, data_args, stream_args, args = parse_script_arguments(
        (ModelArguments, DataArguments, StreamArguments, LoraTrainingArguments), arguments, __doc__
    )
    checkpoint = find_trainer_checkpoint(args.resume_from_checkpoint, args.output_dir, args.trust_checkpoint)
    if model_args.merge_to is not None and os.path.abspath(model_args.merge_to) == os.path.abspath(args.output_dir):
        raise ValueError("--merge_to and --output_dir have to differ: a directory holds adapters or a whole model.")
    if model_args.merge_to is not None and os.path.exists(model_args.merge_to):  # before hours of training
        raise ValueError(f"{model_args.merge_to} exists; --merge_to takes a new directory.")
    model = load_model(model_args, args)
    # A sharded model cannot give the collator codes; the processor then loads a visual tokenizer of its own.
    options = {} if is_sharded_run(args) else {"visual_tokenizer": model.visual_tokenizer}
    processor = ImageTextProcessor.from_pretrained(model_args.model, **options)
    adapted = get_peft_model(model, lora_config(model, model_args))
    upcast_trained_weights(adapted)
    adapted.print_trainable_parameters()
    train_dataset = load_training_data(data_args, stream_args, args, model)
    eval_dataset = None
    if data_args.eval_split is not None:
        num_rows, streaming = data_args.num_eval_rows, stream_args.streaming
        eval_dataset = load_split(data_args, data_args.eval_split, model, num_rows, streaming)
    if args.train_sampling_strategy == "group_by_length":
        for dataset in (train_dataset, eval_dataset):
            if isinstance(dataset, TrainingDataset):  # a stream has no order
                dataset.measure_lengths(processor)
    smoothing = args.label_smoothing_factor
    trainer = StreamTrainer(
        model=adapted,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=LavitDataCollator(
            processor,
            seed=args.seed,
            image_first_probability=data_args.image_first_probability,
            condition_dropout=data_args.condition_dropout,
            keep_rate_range=data_args.keep_rate_range and tuple(data_args.keep_rate_range),
            max_length=data_args.max_length,
            blank_image=train_dataset.image_column != "codes",  # any number of processes trains the same
            # Workers cannot use a GPU. The visual tokenizer of a sharded model is another one, on the CPU.
            encode_later=args.dataloader_num_workers > 0 and args.device.type != "cpu" and not is_sharded_run(args),
        ),
        processing_class=processor,
        callbacks=[EpochCallback(), CheckpointCallback(), FiniteGradientsCallback()],
        # Trainer itself would smooth labels that are not shifted.
        compute_loss_func=LanguageModelingLoss(adapted, smoothing) if smoothing else None,
    )
    if eval_dataset is not None and (pictures := first_pictures(eval_dataset, NUM_SHOWN)):
        ValidationPictures(lambda shown: draw_captions(shown, processor, pictures)).attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_adapter_card(args.output_dir, model_args.model)
    if trainer.train_dataset.num_bad_samples:
        print(f"{trainer.train_dataset.num_bad_samples} samples were bad and are not trained on; see the log.")
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub(tasks="image-text-to-text")
    if model_args.merge_to is not None and trainer.is_world_process_zero():
        merge_adapter(args.output_dir, model_args.merge_to, base=model_args.model)
    return trainer


def load_model(model_args: ModelArguments, args: TrainingArguments) -> LavitForConditionalGeneration:
    """The frozen base model."""
    dtype = model_args.dtype or ("float32" if args.device.type == "cpu" else "auto")
    torch.manual_seed(args.seed)  # for the adapters
    options = {"quantization_config": four_bits(args)} if model_args.load_in_4bit else {}
    return LavitForConditionalGeneration.from_pretrained(model_args.model, dtype=dtype, **options)


def four_bits(args: TrainingArguments) -> BitsAndBytesConfig:
    """As QLoRA has it; what makes codes and features of images stays as it is, and so does the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        llm_int8_skip_modules=["model.visual_tokenizer", "model.multi_modal_projector", "lm_head"],
    )


def lora_config(model: LavitForConditionalGeneration, model_args: ModelArguments) -> Any:
    """What of the model is adapted."""
    options = {} if model_args.train_embeddings else {"modules_to_save": None}
    return get_lora_config(
        model,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        **options,
    )


def load_training_data(
    data_args: DataArguments, stream_args: StreamArguments, args: TrainingArguments, model: Any
) -> TrainingDataset | StreamedTrainingDataset:
    """What to train on: a dataset, or what is read while training goes on."""
    if not stream_args.is_used:
        return load_split(data_args, data_args.train_split, model)
    columns = (data_args.image_column, data_args.text_column)
    options = {"on_bad_sample": data_args.on_bad_sample, "num_scenes": data_args.num_scenes}
    return stream_args.load(
        args, data_args.dataset, data_args.train_split, *columns, visual_tokenizer=model, **options
    )


def load_split(
    data_args: DataArguments, split: str, model: Any, num_rows: int | None = None, streaming: bool = False
) -> TrainingDataset:
    """A split of a dataset on disk or on the Hub, or of scenes; or its first rows."""
    if data_args.dataset is None:
        raise SystemExit("Name the data: --dataset.")
    options = {"num_rows": num_rows, "streaming": streaming, "num_scenes": data_args.num_scenes}
    rows, root = load_rows(data_args.dataset, split, visual_tokenizer=model, **options)
    return TrainingDataset(
        rows,
        image_column=data_args.image_column,
        text_column=data_args.text_column,
        on_bad_sample=data_args.on_bad_sample,
        image_root=root,
    )


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
