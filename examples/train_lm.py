"""Trains the unified language model (stage 2): to read images, and to write them as words of its vocabulary.

    python examples/train_lm.py --model path/to/lavit --dataset path/to/data --output_dir out/lm \
        --num_train_epochs 1 --per_device_train_batch_size 16 --bf16

Or a new LaVIT, from a trained visual tokenizer and any language model:

    python examples/train_lm.py --visual_tokenizer out/tokenizer --text_model meta-llama/Llama-3.2-1B --dataset ...

A row of the dataset has an image (or a list of images, or none) and a text; columns `prompt` (a question, say) and
`messages` are used if there are any. A directory that `lavit tokenize` made is trained on as it is, from ids alone,
with `--packing` if you like. On several devices: `accelerate launch examples/train_lm.py ...`, to shard the model
`accelerate launch --config_file examples/accelerate/fsdp2.yaml ...`. `--config FILE.yaml` takes options
from a file, `--help` lists them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training import (
    CheckpointCallback,
    EpochCallback,
    FiniteGradientsCallback,
    GenerationMetrics,
    LanguageModelingLoss,
    LavitDataCollator,
    StreamArguments,
    StreamedTrainingDataset,
    StreamTrainer,
    TrainingDataset,
    ValidationPictures,
    copy_pixel_decoders,
    draw_captions,
    exit_on_write_errors,
    find_trainer_checkpoint,
    first_pictures,
    freeze_for_language_modeling,
    init_code_embeddings,
    init_merger,
    init_projector,
    is_sharded_run,
    load_rows,
    parse_script_arguments,
)

NUM_SHOWN = 8  # pictures that an evaluation shows in `validation/` and in trackers

_NUM_FIRST_IMAGES = 500  # to center and scale features


@dataclass
class ModelArguments:
    """What to train: `model`, or `text_model` with one of the other two."""

    model: str | None = field(default=None, metadata={"help": "A LaVIT: a directory or a repository of the Hub."})
    text_model: str | None = field(default=None, metadata={"help": "A language model, for a new LaVIT."})
    visual_tokenizer: str | None = field(default=None, metadata={"help": "Its visual tokenizer, trained in stage 1."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Its vision encoder, if there is no visual tokenizer: it will not draw then."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the language model, such as sdpa (default) or eager."}
    )
    init_code_embeddings: bool = field(
        default=False, metadata={"help": "Start the embeddings of visual ids from the codebook, not at random."}
    )
    init_merger: bool = field(
        default=False, metadata={"help": "Start with a merger that passes on the features of the encoder."}
    )
    init_projector: bool = field(
        default=False, metadata={"help": "Start with a projector that centers, scales and rotates features."}
    )
    freeze_image_features: bool = field(
        default=False, metadata={"help": "Leave projector and merger as they are, whatever the language model learns."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "dtype of the weights; with --bf16 keep float32, which learns better."}
    )


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A directory made by `lavit tokenize` or save_to_disk, a folder of images with a metadata.jsonl, "
            "the name of a dataset, 'scenes' or 'emoji'. Instead: --mixture."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; by default none."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    num_scenes: int = field(default=10_000, metadata={"help": "For 'scenes' and 'emoji': how many."})
    num_eval_rows: int = field(default=200, metadata={"help": "How many rows of the evaluation split to use."})
    image_first_probability: float = field(
        default=0.5, metadata={"help": "How often an image is read and its text learned; otherwise it is drawn."}
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "How often an image is drawn without its text."})
    text_noise: float = field(
        default=0.0,
        metadata={"help": "Share of words after an image that are read wrong, while the right ones are learned."},
    )
    keep_rate_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Two numbers: images that are read become shares of their patches that are drawn from between "
            "them, so that the model learns all budgets. By default the visual tokenizer decides."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Longer rows lose text."})
    packing: bool = field(default=False, metadata={"help": "Several rows per sequence; of codes, or with budgets."})
    on_bad_sample: str = field(default="skip", metadata={"help": "What to do about bad samples: skip or raise."})


@dataclass
class LmTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate."})
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
        (ModelArguments, DataArguments, StreamArguments, LmTrainingArguments), arguments, __doc__
    )
    checkpoint = find_trainer_checkpoint(args.resume_from_checkpoint, args.output_dir, args.trust_checkpoint)
    torch.manual_seed(args.seed)  # for what is new
    model, processor = load_model(model_args)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation({"text_config": model_args.attn_implementation})
    train_dataset = load_training_data(data_args, stream_args, args, model)
    is_packable = not data_args.packing or data_args.keep_rate_range is not None
    reads_features = train_dataset.image_column != "codes" and is_packable
    freeze_for_language_modeling(model)
    if model_args.init_code_embeddings:
        init_code_embeddings(model, args.seed)
    if (model_args.init_merger or model_args.init_projector) and not reads_features:
        raise ValueError("--init_merger and --init_projector are for features, but images are codes here.")
    if model_args.init_merger:
        init_merger(model)
    if model_args.init_projector:
        init_projector(model, first_images(train_dataset, processor), seed=args.seed)
    if model_args.freeze_image_features or not reads_features:  # without features, no image reaches these
        model.visual_tokenizer.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    attach_visual_tokenizer(processor, model, model_args, args)
    # Every process has to use the same layers, whatever it draws from the dataset; and one has to train as several do.
    blank_image = reads_features
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
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
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=LavitDataCollator(
            processor,
            seed=args.seed,
            image_first_probability=data_args.image_first_probability,
            condition_dropout=data_args.condition_dropout,
            max_length=data_args.max_length,
            packing=data_args.packing,
            blank_image=blank_image,
            text_noise=data_args.text_noise,
            keep_rate_range=data_args.keep_rate_range and tuple(data_args.keep_rate_range),
            # Workers cannot use a GPU. The visual tokenizer of a sharded model is another one, on the CPU.
            encode_later=args.dataloader_num_workers > 0 and args.device.type != "cpu" and not is_sharded_run(args),
        ),
        processing_class=processor,
        callbacks=[EpochCallback(), CheckpointCallback(), FiniteGradientsCallback()],
        # Trainer itself would smooth labels that are not shifted.
        compute_loss_func=LanguageModelingLoss(model, smoothing) if smoothing else None,
    )
    if eval_dataset is not None and eval_dataset.image_column != "codes":
        add_evaluation(trainer, eval_dataset, processor)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if train_dataset.num_bad_samples:
        print(f"{train_dataset.num_bad_samples} samples were bad and are not trained on; see the log.")
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    if model_args.model is not None and trainer.is_world_process_zero():
        copy_pixel_decoders(model_args.model, args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(tasks="image-text-to-text")
    return trainer


def load_model(model_args: ModelArguments) -> tuple[LavitForConditionalGeneration, ImageTextProcessor]:
    """The model and its processor, loaded or new."""
    parts = (model_args.text_model, model_args.visual_tokenizer, model_args.vision_model)
    if model_args.model is not None and any(part is not None for part in parts):
        raise SystemExit(
            "Give either --model, which has all parts, or --text_model with --visual_tokenizer or --vision_model."
        )
    if model_args.model is not None:
        model = LavitForConditionalGeneration.from_pretrained(model_args.model, dtype=model_args.dtype)
        return model, ImageTextProcessor.from_pretrained(model_args.model)
    vision, text = model_args.vision_model, model_args.text_model
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        vision, text, visual_tokenizer=model_args.visual_tokenizer, dtype=model_args.dtype
    )
    source = vision or model_args.visual_tokenizer
    return model, ImageTextProcessor.from_vision_text_pretrained(source, text, config=model)


def first_images(dataset: TrainingDataset | StreamedTrainingDataset, processor: ImageTextProcessor) -> torch.Tensor:
    """Pixels of the first image of the first rows that have one."""
    images: list[Any] = []
    for sample in itertools.takewhile(lambda sample: sample["epoch"] == 0, dataset):  # a stream has no end
        images += sample.get("images", [])[:1]
        if len(images) == _NUM_FIRST_IMAGES:
            break
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def attach_visual_tokenizer(
    processor: ImageTextProcessor,
    model: LavitForConditionalGeneration,
    model_args: ModelArguments,
    args: TrainingArguments,
) -> None:
    """Lets the processor encode images that are drawn: by the model's own tokenizer, unless that will be sharded."""
    if not is_sharded_run(args):
        processor.visual_tokenizer = model
    elif model_args.model is None:
        raise ValueError(
            "Sharded training starts from a saved LaVIT: save the new one first, then pass it as --model."
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
    """A split of the dataset, or its first rows."""
    if data_args.dataset is None:
        raise SystemExit("Name the data: --dataset.")
    options = {"num_rows": num_rows, "streaming": streaming, "num_scenes": data_args.num_scenes}
    rows, root = load_rows(data_args.dataset, split, visual_tokenizer=model, **options)
    columns = (data_args.image_column, data_args.text_column)
    return TrainingDataset(rows, *columns, data_args.on_bad_sample, image_root=root)


def add_evaluation(trainer: Trainer, samples: TrainingDataset, processor: ImageTextProcessor) -> None:
    """Evaluates what the model writes, beside the loss, and shows it."""
    metrics = GenerationMetrics(trainer.model, processor, samples, score_words)
    trainer.compute_metrics = metrics
    trainer.preprocess_logits_for_metrics = metrics.drop_logits
    if pictures := first_pictures(samples, NUM_SHOWN):
        ValidationPictures(lambda shown: draw_captions(shown, processor, pictures)).attach(trainer)


def score_words(written: list[str], references: list[str]) -> dict[str, float]:
    """How many texts are exactly right, and how well their words agree (F1)."""
    pairs = [(text.split(), reference.split()) for text, reference in zip(written, references, strict=True)]
    agreement = [
        2 * sum(min(text.count(word), reference.count(word)) for word in set(reference)) / (len(text) + len(reference))
        for text, reference in pairs
    ]
    exact = [text == reference for text, reference in pairs]
    return {"exact": sum(exact) / len(pairs), "word_f1": sum(agreement) / len(pairs)}


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
