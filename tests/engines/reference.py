"""What our own `generate` says of scenes, greedily in float32: servers of the same weights have to say the same."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.hub.facts import world_of
from lavit_hf.pipelines.image_to_text import question_prompt

NUM_SCENES, NUM_DRAWN = 32, 16
LENGTH = {"max_new_tokens": 40, "num_beams": 1, "do_sample": False}


@dataclass
class Reference:
    """Prompts and what follows them. Ids of answers are without the end of the text, those of pictures without theirs.

    Attributes:
        embeddings: Pictures as the language model sees them, `[tokens, width]`, with start and end.
        kept: How many features each picture has.
    """

    checkpoint: Path
    pictures: list[Image.Image]
    questions: list[str]
    kept: list[int]
    embeddings: list[torch.Tensor]
    discrete_prompts: list[list[int]]
    drawing_prompts: list[list[int]]
    text_ids: list[int]
    picture_ids: list[int]
    end_of_picture: int
    end_of_text: int
    vocab_size: int
    shortest: int
    longest: int = LENGTH["max_new_tokens"]
    longest_drawing: int = 64  # a picture has no more codes than patches, which servers do not know
    captions: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    answers_of_two: list[list[int]] = field(default_factory=list)
    captions_of_8: list[list[int]] = field(default_factory=list)
    captions_of_third: list[list[int]] = field(default_factory=list)
    discrete_captions_of_8: list[list[int]] = field(default_factory=list)
    discrete_captions: list[list[int]] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)

    def url(self, index: int) -> str:
        """A picture as a data URL."""
        file = io.BytesIO()
        self.pictures[index].save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def count_equal(got: list[list[int]], expected: list[list[int]]) -> str:
    """How many rows are equal, as the tables of documentation say it."""
    assert len(got) == len(expected)
    return f"{sum(a == b for a, b in zip(got, expected, strict=True))}/{len(expected)}"


def make_reference() -> Reference:
    """Asks the default checkpoint about scenes."""
    path = Path(default_checkpoint())
    model = LavitForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = ImageTextProcessor.from_pretrained(path, visual_tokenizer=model.visual_tokenizer)
    world = world_of(path)
    scenes = [world.row("validation", 0, index) for index in range(NUM_SCENES)]
    pictures = [Image.open(io.BytesIO(scene["image"]["bytes"])).convert("RGB") for scene in scenes]
    questions = [scene["questions"][0]["question"] for scene in scenes]
    end_of_text = model.generation_config.eos_token_id

    def write(**inputs) -> list[list[int]]:
        inputs = processor(**inputs, padding=True, return_tensors="pt")
        rows = model.generate(**inputs, **LENGTH)[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end_of_text)] if end_of_text in row else row for row in rows]

    def discrete(index: int) -> list[int]:
        return processor(images=pictures[index], text="<image>", visual_mode="discrete")["input_ids"][0]

    def drawing(text: str) -> list[int]:
        return processor(text=text, generation_mode="image")["input_ids"][0]

    visual = set(model.config.visual_token_ids)
    found = Reference(
        checkpoint=path,
        pictures=pictures,
        questions=questions,
        kept=[],
        embeddings=[],
        discrete_prompts=[discrete(index) for index in range(NUM_SCENES)],
        drawing_prompts=[drawing(scene["text"]) for scene in scenes[:NUM_DRAWN]],
        text_ids=[index for index in range(model.config.text_config.vocab_size) if index not in visual],
        picture_ids=[model.config.eoi_token_id, *range(model.config.visual_token_offset, len(processor.tokenizer))],
        end_of_picture=model.config.eoi_token_id,
        end_of_text=end_of_text,
        vocab_size=model.config.text_config.vocab_size,
        shortest=model.generation_config.min_new_tokens,
    )
    asked = [question_prompt(question) for question in questions]
    found.captions = write(images=pictures, text=["<image>"] * NUM_SCENES)
    found.captions_of_8 = write(images=pictures, text=["<image>"] * NUM_SCENES, num_image_tokens=8)
    found.captions_of_third = write(images=pictures, text=["<image>"] * NUM_SCENES, keep_rate=1 / 3)
    discrete_8 = {"num_image_tokens": 8, "visual_mode": "discrete"}
    found.discrete_captions_of_8 = write(images=pictures, text=["<image>"] * NUM_SCENES, **discrete_8)
    found.answers = write(images=pictures, text=["<image>" + question for question in asked])
    pairs = [[pictures[index - 1], pictures[index]] for index in range(8)]
    found.answers_of_two = write(images=pairs, text=["<image><image>" + question for question in asked[:8]])
    found.discrete_captions = write(images=pictures, text=["<image>"] * NUM_SCENES, visual_mode="discrete")
    for prompt in found.drawing_prompts:
        ids = torch.tensor([prompt])
        options = {
            "generation_mode": "image",
            "guidance_scale": 1.0,
            "max_new_tokens": found.longest_drawing,
            "do_sample": False,
        }
        (row,) = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, len(prompt) :].tolist()
        found.drawn.append(row[: row.index(found.end_of_picture)] if found.end_of_picture in row else row)
    with torch.no_grad():
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        embed = model.get_input_embeddings()
        start, end = (embed(torch.tensor([index])) for index in (model.config.boi_token_id, found.end_of_picture))
        for features in model.get_image_features(pixel_values=pixels).pooler_output:
            found.kept.append(len(features))
            found.embeddings.append(torch.cat([start, features, end]))
    return found
