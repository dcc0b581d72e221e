"""Text from images, with a progress bar."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm
from PIL import Image
from transformers import StoppingCriteriaList

from ..modeling.token_progress import TokenProgress
from .loading import Lavit

CAPTION = {"num_beams": 2, "length_penalty": 1.0, "min_new_tokens": 8, "max_new_tokens": 36}
ANSWER = {"num_beams": 5, "length_penalty": 0.0, "min_new_tokens": 2, "max_new_tokens": 10}


def generate_text(lavit: Lavit, images: list[Image.Image], prompts: list[str], options: dict[str, Any]) -> list[str]:
    """Generates one text per image.

    Args:
        lavit: Model and processor.
        images: One per prompt.
        prompts: What follows the image.
        options: For `generate`.

    Returns:
        The new texts, stripped.

    Raises:
        ValueError: A prompt contains the placeholder of an image.
    """
    for prompt in prompts:
        if "<image>" in prompt:
            raise ValueError("<image> cannot be part of a question or prompt here: the image stands before it.")
    texts = [f"<image>{prompt}" for prompt in prompts]
    inputs = lavit.processor(images=images, text=texts, padding=True, return_tensors="pt").to(lavit.model.device)
    # The bar shows up only if generation takes longer than a second.
    with tqdm(total=options["max_new_tokens"], desc="Generating", unit="token", delay=1.0, leave=False) as bar:
        progress = StoppingCriteriaList([TokenProgress(bar)])
        output = lavit.model.generate(**inputs, do_sample=False, stopping_criteria=progress, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in lavit.processor.batch_decode(new, skip_special_tokens=True)]


def caption_images(lavit: Lavit, images: list[Image.Image], prompt: str, options: dict[str, Any]) -> list[str]:
    """Describes images in one sentence each, without its period."""
    return [first_sentence(text) for text in generate_text(lavit, images, [prompt] * len(images), options)]


def first_sentence(text: str) -> str:
    """What stands before the first period, in one line."""
    return " ".join(text.partition(".")[0].split())


def answer_question(lavit: Lavit, image: Image.Image, question: str, options: dict[str, Any]) -> str:
    """Answers a question about an image."""
    # Hypotheses of a search without length penalty cannot improve any more once enough are complete.
    options = {"early_stopping": options["num_beams"] > 1, **options}
    (text,) = generate_text(lavit, [image], [f"Question: {question} Answer:"], options)
    return " ".join(text.split())
