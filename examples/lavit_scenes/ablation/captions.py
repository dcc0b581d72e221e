"""Trains small language models to caption scenes from one kind of token each, and checks their captions."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.data.scenes import make_scenes, render, sample_scene, scene_row
from lavit_hf.evaluation import Measurement, compare_facts, measure_facts, read_facts
from lavit_hf.training import LavitDataCollator, TrainingDataset, init_code_embeddings, init_projector

from .selection import KEEP_RATE_RANGE, blind
from .training import training_arguments

_NUM_FIRST_IMAGES = 500
_GREEDY = {"do_sample": False, "num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 48}


def train_captioner(
    visual_tokenizer: str,
    text_model: str,
    selection: str,
    mode: str,
    has_budgets: bool,
    num_steps: int,
    output_dir: Path,
) -> tuple[LavitForConditionalGeneration, ImageTextProcessor]:
    """A language model that reads pictures as `mode` says: as features (`continuous`) or as codes (`discrete`)."""
    torch.manual_seed(0)
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        None, text_model, visual_tokenizer=visual_tokenizer, dtype="float32"
    )
    processor = ImageTextProcessor.from_vision_text_pretrained(visual_tokenizer, text_model, config=model)
    processor.visual_tokenizer = model
    processor.visual_mode = mode
    blind(model.visual_tokenizer, selection)
    start_from_visual_tokenizer(model, processor)
    batch_size = 32
    trainer = Trainer(
        model=model,
        args=training_arguments(output_dir, num_steps, batch_size, learning_rate=1e-3, weight_decay=0.05),
        train_dataset=_captions(processor, num_steps * batch_size),
        data_collator=LavitDataCollator(
            processor, image_first_probability=1.0, keep_rate_range=KEEP_RATE_RANGE if has_budgets else None
        ),
    )
    trainer.train()
    return model.eval(), processor


def start_from_visual_tokenizer(model: LavitForConditionalGeneration, processor: ImageTextProcessor) -> None:
    """What reads images starts at what the visual tokenizer knows, and only the language model learns."""
    images = [render(sample_scene("train", 0, index)) for index in range(_NUM_FIRST_IMAGES)]
    init_code_embeddings(model)
    init_projector(model, processor.image_processor(images, return_tensors="pt")["pixel_values"])
    model.visual_tokenizer.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)


def _captions(processor: ImageTextProcessor, num_scenes: int) -> TrainingDataset:
    """Pictures with captions; pictures that are read as codes are read once and for all."""
    if processor.visual_mode == "continuous":
        return TrainingDataset(make_scenes("train", num_scenes=num_scenes), "image", "text")
    rows = []
    for start in range(0, num_scenes, 200):
        indices = range(start, min(start + 200, num_scenes))
        images = [render(sample_scene("train", 0, index)) for index in indices]
        for index, ids in zip(indices, processor.tokenize_images(images), strict=True):
            codes = processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()
            rows.append({"codes": [codes], "text": scene_row("train", 0, index)["text"]})
    return TrainingDataset(rows, "codes", "text")


def measure_captions(
    model: LavitForConditionalGeneration,
    processor: ImageTextProcessor,
    num_scenes: int,
    num_image_tokens: int | None = None,
) -> dict[str, Measurement]:
    """How many captions of new scenes are fully right, and how many colors and shapes of objects.

    With `num_image_tokens` every picture becomes so many tokens; else the selector decides.
    """
    torch.manual_seed(0)  # for patches that are kept by chance
    scenes = [sample_scene("validation", 0, index) for index in range(num_scenes)]
    comparisons = []
    for start in range(0, len(scenes), 100):
        part = scenes[start : start + 100]
        images, prompts = [render(scene) for scene in part], ["<image>"] * len(part)
        budget = {} if num_image_tokens is None else {"num_image_tokens": num_image_tokens}
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt", **budget).to(model.device)
        written = model.generate(**inputs, **_GREEDY)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(written, skip_special_tokens=True)
        found = [read_facts(" ".join(text.partition(".")[0].split())) for text in texts]
        comparisons += [compare_facts(facts, scene) for facts, scene in zip(found, part, strict=True)]
    measured = measure_facts(comparisons)
    return {name: measured[name] for name in ("fully_right", "color", "shape")}
