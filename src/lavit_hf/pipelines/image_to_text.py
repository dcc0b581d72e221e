"""Captions and answers as the original writes them (LaVIT paper, section 4.1; its own scripts)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

if TYPE_CHECKING:
    from ..modeling.modeling_lavit import LavitForConditionalGeneration
    from ..processing.processing_lavit import ImageTextProcessor

CAPTION = {"num_beams": 2, "length_penalty": 1.0, "min_new_tokens": 8, "max_new_tokens": 36}
ANSWER = {"num_beams": 5, "length_penalty": 0.0, "min_new_tokens": 2, "max_new_tokens": 10}


@torch.no_grad()
def generate_text(
    model: LavitForConditionalGeneration,
    processor: ImageTextProcessor,
    images: Sequence[Any],
    prompts: Sequence[str],
    options: dict[str, Any],
    stopping_criteria: StoppingCriteriaList | None = None,
    num_image_tokens: int | None = None,
    regions: Any = None,
    visual_mode: str | None = None,
) -> list[str]:
    """Generates one text per image, by beam search or greedily.

    Args:
        model: The model.
        processor: Its processor.
        images: One per prompt.
        prompts: What follows the image.
        options: For `generate`.
        stopping_criteria: For `generate`.
        num_image_tokens: How many tokens an image becomes; by default the visual tokenizer decides.
        regions: Where in them tokens are worth more, one entry for each.
        visual_mode: `"discrete"` for images as codes; by default the processor's own.

    Returns:
        The new texts, stripped.

    Raises:
        ValueError: A prompt contains the placeholder of an image.
    """
    for prompt in prompts:
        if processor.image_token in prompt:
            raise ValueError(
                f"{processor.image_token} cannot be part of a question or prompt here: the image stands before it."
            )
    texts = [f"{processor.image_token}{prompt}" for prompt in prompts]
    entering = {"num_image_tokens": num_image_tokens, "regions": regions, "visual_mode": visual_mode}
    inputs = processor(images=list(images), text=texts, **entering, padding=True, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=False, stopping_criteria=stopping_criteria, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def merge_options(
    model: LavitForConditionalGeneration, original: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Options for `generate`: those given, or what the checkpoint's generation config says, or the original's.

    Args:
        model: The model.
        original: The options of the original for a task, such as `CAPTION`.
        given: Those of the user; `None` is not given.
    """
    own = {name: getattr(model.generation_config, name, None) for name in original}
    layers = (original, own, given)
    return {name: value for layer in layers for name, value in layer.items() if value is not None}


def first_sentence(text: str) -> str:
    """What stands before the first period, in one line: a generated text as a caption."""
    return " ".join(text.partition(".")[0].split())


def answer_of(text: str) -> str:
    """A generated text as an answer: all of it, in one line."""
    return " ".join(text.split())


def question_prompt(question: str) -> str:
    """How a question is put."""
    return f"Question: {question} Answer:"


def answer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate` that end a search as the original does: once as many answers are complete as beams."""
    return {"early_stopping": options["num_beams"] > 1, **options}
