"""Trains small language models to caption scenes from one kind of token each, and checks their captions."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.data.worlds import World
from lavit_hf.evaluation import Measurement, compare_facts, measure_facts
from lavit_hf.training import LavitDataCollator, TrainingDataset, init_code_embeddings, init_projector

from .selection import KEEP_RATE_RANGE, blind
from .training import training_arguments

_NUM_FIRST_IMAGES = 500
_GREEDY = {"do_sample": False, "num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 48}


def train_captioner(
    world: World,
    visual_tokenizer: str,
    text_model: str,
    selection: str,
    mode: str,
    has_budgets: bool,
    num_steps: int,
    output_dir: Path,
    bf16: bool,
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
    start_from_visual_tokenizer(model, processor, world)
    batch_size = 32
    trainer = Trainer(
        model=model,
        args=training_arguments(output_dir, num_steps, batch_size, 1e-3, 0.05, bf16),
        train_dataset=_captions(processor, world, num_steps * batch_size),
        data_collator=LavitDataCollator(
            processor, image_first_probability=1.0, keep_rate_range=KEEP_RATE_RANGE if has_budgets else None
        ),
    )
    trainer.train()
    return model.eval(), processor


def start_from_visual_tokenizer(
    model: LavitForConditionalGeneration, processor: ImageTextProcessor, world: World
) -> None:
    """What reads images starts at what the visual tokenizer knows, and only the language model learns."""
    images = list(world.make_dataset(world.splits[0], _NUM_FIRST_IMAGES)["image"])
    init_code_embeddings(model)
    init_projector(model, processor.image_processor(images, return_tensors="pt")["pixel_values"])
    model.visual_tokenizer.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)


def _captions(processor: ImageTextProcessor, world: World, num_scenes: int) -> TrainingDataset:
    """Pictures with captions; pictures that are read as codes are read once and for all."""
    scenes = world.make_dataset(world.splits[0], num_scenes)
    if processor.visual_mode == "continuous":
        return TrainingDataset(scenes, "image", "text")
    rows = []
    for part in scenes.iter(batch_size=200):
        for text, ids in zip(part["text"], processor.tokenize_images(part["image"]), strict=True):
            codes = processor.tokenizer.convert_ids_to_codes(ids[1:-1]).tolist()
            rows.append({"codes": [codes], "text": text})
    return TrainingDataset(rows, "codes", "text")


def measure_captions(
    model: LavitForConditionalGeneration,
    processor: ImageTextProcessor,
    world: World,
    num_scenes: int,
    num_image_tokens: int | None = None,
) -> dict[str, Measurement]:
    """How many captions of new scenes are right, fully and in each kind of fact.

    With `num_image_tokens` every picture becomes so many tokens; else the selector decides.
    """
    torch.manual_seed(0)  # for patches that are kept by chance
    scenes = [world.sample_scene(world.splits[1], 0, index) for index in range(num_scenes)]
    comparisons = []
    for start in range(0, len(scenes), 100):
        part = scenes[start : start + 100]
        images, prompts = [world.render(scene) for scene in part], ["<image>"] * len(part)
        budget = {} if num_image_tokens is None else {"num_image_tokens": num_image_tokens}
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt", **budget).to(model.device)
        written = model.generate(**inputs, **_GREEDY)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(written, skip_special_tokens=True)
        found = [world.parse_caption(" ".join(text.partition(".")[0].split())) for text in texts]
        comparisons += [compare_facts(facts, scene, world) for facts, scene in zip(found, part, strict=True)]
    return measure_facts(comparisons, world=world)
