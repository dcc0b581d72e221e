"""Text from images, with a progress bar."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm
from PIL import Image
from transformers import StoppingCriteriaList

from ..modeling.token_progress import TokenProgress
from ..pipelines import image_to_text
from ..pipelines.image_to_text import ANSWER, CAPTION, answer_of, answer_options, first_sentence, question_prompt
from .loading import Lavit


def generate_text(lavit: Lavit, images: list[Image.Image], prompts: list[str], options: dict[str, Any]) -> list[str]:
    """Generates one text per image; arguments as for `lavit_hf.pipelines.image_to_text.generate_text`."""
    # The bar shows up only if generation takes longer than a second.
    with tqdm(total=options["max_new_tokens"], desc="Generating", unit="token", delay=1.0, leave=False) as bar:
        progress = StoppingCriteriaList([TokenProgress(bar)])
        return image_to_text.generate_text(lavit.model, lavit.processor, images, prompts, options, progress)


def caption_images(lavit: Lavit, images: list[Image.Image], prompt: str, options: dict[str, Any]) -> list[str]:
    """Describes images in one sentence each, without its period."""
    return [first_sentence(text) for text in generate_text(lavit, images, [prompt] * len(images), options)]


def answer_question(lavit: Lavit, image: Image.Image, question: str, options: dict[str, Any]) -> str:
    """Answers a question about an image."""
    (text,) = generate_text(lavit, [image], [question_prompt(question)], answer_options(options))
    return answer_of(text)


__all__ = ["ANSWER", "CAPTION", "answer_question", "caption_images", "first_sentence", "generate_text"]
