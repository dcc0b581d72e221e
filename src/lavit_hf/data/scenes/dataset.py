"""Scenes as datasets of Hugging Face `datasets`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import collect_rows, import_datasets
from .language import ask_questions, write_caption
from .pictures import MIN_IMAGE_SIZE, render
from .world import CAPTION, QUESTIONS, rng_for, sample_scene

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]


def make_scenes(split: str = "train", num_scenes: int = 1000, seed: int = 0, image_size: int = 64) -> datasets.Dataset:
    """Makes pictures of scenes, with captions, questions and the truth.

    Args:
        split: `"train"`, `"validation"` (other scenes, from the same combinations) or `"held_out"` (every scene has a
            pair of shape and color that the other two never show).
        num_scenes: How many; more of them begin with the same.
        seed: Another one gives other scenes.
        image_size: Width and height in pixels; scenes, captions and questions do not depend on it.

    Returns:
        A dataset in memory (1.2 KB per scene of 64 x 64 pixels) with the columns

        - `image`: the picture, RGB;
        - `text`: a caption, to be read by `parse_caption`;
        - `questions`: a list of `question`, `answer` and `kind`;
        - `scene`: what is on it, to be read by `Scene.from_dict`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: There is no such split, a number is negative, or the picture would be too small.
    """
    datasets = import_datasets()
    _check(split, seed, image_size, num_scenes)
    rows = (scene_row(split, seed, index, image_size) for index in range(num_scenes))
    return collect_rows(rows, _features(datasets))


def stream_scenes(
    split: str = "train",
    seed: int = 0,
    image_size: int = 64,
    num_scenes: int | None = None,
    num_shards: int = 1,
) -> datasets.IterableDataset:
    """Makes the same scenes as [`make_scenes`] while they are read.

    Args:
        split: As for [`make_scenes`].
        seed: As for [`make_scenes`].
        image_size: As for [`make_scenes`].
        num_scenes: Where to end; by default never.
        num_shards: Shard k has the scenes k, k + num_shards and so on. One for each worker of a `DataLoader` lets them
            share the work; read without workers, shards come one after another, so an endless one hides all others.

    Returns:
        A dataset with the same columns, in the order of scenes if there is one shard.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: As for [`make_scenes`].
    """
    datasets = import_datasets()
    _check(split, seed, image_size, num_scenes or 0)
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}.")
    arguments = {
        "first": list(range(num_shards)),  # a list: what `datasets` divides among workers
        "step": num_shards,
        "end": num_scenes,
        "split": split,
        "seed": seed,
        "image_size": image_size,
    }
    return datasets.IterableDataset.from_generator(_generate, features=_features(datasets), gen_kwargs=arguments)


def scene_row(split: str, seed: int, index: int, image_size: int = 64) -> dict[str, Any]:
    """Makes row `index` of the datasets, the picture as the content of a PNG file; needs no `datasets`."""
    scene = sample_scene(split, seed, index)
    file = io.BytesIO()
    render(scene, image_size).save(file, format="PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "text": write_caption(scene, rng_for(split, seed, index, CAPTION)),
        "questions": [question._asdict() for question in ask_questions(scene, rng_for(split, seed, index, QUESTIONS))],
        "scene": scene.to_dict(),
    }


def _generate(
    first: list[int], step: int, end: int | None, split: str, seed: int, image_size: int
) -> Iterator[dict[str, Any]]:
    for index in first:
        while end is None or index < end:
            yield scene_row(split, seed, index, image_size)
            index += step


def _check(split: str, seed: int, image_size: int, num_scenes: int) -> None:
    """Checks arguments at once, not when the first scene is made."""
    rng_for(split, seed, 0, CAPTION)
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {image_size}.")
    if num_scenes < 0:
        raise ValueError(f"num_scenes must not be negative, got {num_scenes}.")


def _features(datasets: Any) -> Any:
    text, number = datasets.Value("string"), datasets.Value("int32")
    item = {"shape": text, "color": text, "size": text, "x": number, "y": number}
    return datasets.Features(
        {
            "image": datasets.Image(),
            "text": text,
            "questions": [{"question": text, "answer": text, "kind": text}],
            "scene": {"background": text, "objects": [item]},
        }
    )
