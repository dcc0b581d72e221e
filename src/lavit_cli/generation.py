"""Text from images, with a progress bar."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import StoppingCriteriaList

from lavit_hf.pipelines import image_to_text
from lavit_hf.pipelines.image_to_text import (
    ANSWER,
    CAPTION,
    answer_of,
    answer_options,
    first_sentence,
    merge_options,
    question_prompt,
)
from lavit_hf.utils.progress import TokenProgress, progress_bar

from .loading import Lavit


def generation_options(lavit: Lavit, original: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate`: what the user gave, or what the checkpoint's generation config says, or the original's.

    Args:
        lavit: The checkpoint.
        original: The options of the original for a task.
        given: Those of the user; `None` is not given.

    Raises:
        ValueError: They contradict each other.
    """
    options = merge_options(lavit.model, original, given)
    if options["min_new_tokens"] > options["max_new_tokens"]:
        raise ValueError(
            f"--min-new-tokens ({options['min_new_tokens']}) is more than --max-new-tokens "
            f"({options['max_new_tokens']})."
        )
    return options


def generate_text(
    lavit: Lavit,
    images: list[Image.Image],
    prompts: list[str],
    options: dict[str, Any],
    num_image_tokens: int | None = None,
    regions: Any = None,
) -> list[str]:
    """Generates one text per image; arguments as for `lavit_hf.pipelines.image_to_text.generate_text`."""
    # The bar shows up only if generation takes longer than a second.
    with progress_bar("Generating", options["max_new_tokens"], unit="token", delay=1.0, leave=False) as bar:
        progress = StoppingCriteriaList([TokenProgress(bar)])
        return image_to_text.generate_text(
            lavit.model, lavit.processor, images, prompts, options, progress, num_image_tokens, regions
        )


def caption_images(
    lavit: Lavit,
    images: list[Image.Image],
    prompt: str = "",
    options: dict[str, Any] | None = None,
    num_image_tokens: int | None = None,
    regions: Any = None,
) -> list[str]:
    """Describes images in one sentence each, without its period; options as for `generation_options`."""
    options = generation_options(lavit, CAPTION, options or {})
    texts = generate_text(lavit, images, [prompt] * len(images), options, num_image_tokens, regions)
    return [first_sentence(text) for text in texts]


def answer_question(
    lavit: Lavit,
    image: Image.Image,
    question: str,
    options: dict[str, Any] | None = None,
    num_image_tokens: int | None = None,
    regions: Any = None,
) -> str:
    """Answers a question about an image; options as for `generation_options`."""
    options = generation_options(lavit, ANSWER, options or {})
    prompts = [question_prompt(question)]
    (text,) = generate_text(lavit, [image], prompts, answer_options(options), num_image_tokens, regions)
    return answer_of(text)


__all__ = ["answer_question", "caption_images", "first_sentence", "generate_text", "generation_options"]
