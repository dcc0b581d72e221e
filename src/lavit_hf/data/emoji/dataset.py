"""Scenes as datasets of Hugging Face `datasets`, and as batches of tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .. import collect_rows, import_datasets
from ..scenes.world import PortableRng
from .language import ask_questions, write_caption
from .looks import draw_looks
from .pictures import IMAGE_SIZE, PatchLabels, check_image_size, label_patches, render_scenes
from .world import CAPTION, QUESTIONS, SPLITS, SceneArrays, rng_for, sample_scenes

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]


def make_emoji(
    split: str = "train",
    num_scenes: int = 1000,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    shared_only: bool = False,
) -> datasets.Dataset:
    """Makes pictures of scenes, with captions, questions and the truth.

    Args:
        split: `"train"`, `"validation"`, `"held_out"`, `"unseen_artist"` or `"single"`; see `sample_scenes`.
        num_scenes: How many; more of them begin with the same.
        seed: Another one gives other scenes.
        image_size: Width and height in pixels; scenes, captions and questions do not depend on it.
        shared_only: Whether to leave out concepts that an artist did not draw: a smaller world.

    Returns:
        A dataset in memory (about 9 KB per scene of 96 x 96 pixels) with the columns

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
    starts = range(0, num_scenes, _SCENES_AT_ONCE)
    parts = (np.arange(start, min(start + _SCENES_AT_ONCE, num_scenes)) for start in starts)
    rows = (row for indices in parts for row in _make_rows(split, seed, indices, image_size, shared_only))
    return collect_rows(rows, _features(datasets))


def emoji_row(
    split: str, seed: int, index: int, image_size: int = IMAGE_SIZE, shared_only: bool = False
) -> dict[str, Any]:
    """Makes row `index` of the dataset, the picture as the content of a PNG file; needs no `datasets`."""
    return next(_make_rows(split, seed, np.array([index]), image_size, shared_only))


def _make_rows(
    split: str, seed: int, indices: np.ndarray, image_size: int, shared_only: bool
) -> Iterator[dict[str, Any]]:
    """Makes rows whose scenes are drawn at once, which is many times as fast as one by one."""
    arrays = sample_scenes(split, seed, indices, shared_only)
    pictures = render_scenes(arrays, image_size).permute(0, 2, 3, 1).numpy()
    for index, scene, picture in zip(indices.tolist(), arrays.to_scenes(), pictures, strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="PNG")
        questions = ask_questions(scene, _text_rng(split, seed, index, QUESTIONS), shared_only)
        yield {
            "image": {"bytes": file.getvalue(), "path": None},
            "text": write_caption(scene, _text_rng(split, seed, index, CAPTION)),
            "questions": [question._asdict() for question in questions],
            "scene": scene.to_dict(),
        }


_SCENES_AT_ONCE = 256


class EmojiBatch(NamedTuple):
    """Pictures as tensors.

    Attributes:
        pixels: Bytes, `[batch, 3, image_size, image_size]`.
        labels: Of their patches.
        scenes: What is on them.
    """

    pixels: torch.Tensor
    labels: PatchLabels
    scenes: SceneArrays


def stream_batches(
    split: str = "train",
    seed: int = 0,
    batch_size: int = 256,
    start: int = 0,
    image_size: int = IMAGE_SIZE,
    patches_per_side: int = 12,
    device: str | torch.device = "cpu",
    varied: bool = False,
    shared_only: bool = False,
) -> Iterator[EmojiBatch]:
    """Makes batches of the same scenes as [`make_emoji`], without end, fast enough to feed a GPU.

    Args:
        split: As for [`make_emoji`].
        seed: As for [`make_emoji`].
        batch_size: Pictures in a batch.
        start: Index of the first scene: where to go on after an interruption.
        image_size: As for [`make_emoji`].
        patches_per_side: Patches that have labels, across and down.
        device: Where pictures are drawn.
        varied: Whether objects and backgrounds get other colors, proportions and outlines, and so look as if by more
            artists. Where a background was repainted, its label is -100.
        shared_only: As for [`make_emoji`].

    Returns:
        Batches.

    Raises:
        ValueError: As for [`make_emoji`].
    """
    _check(split, seed, image_size, start)
    if batch_size < 1 or patches_per_side < 1:
        raise ValueError(f"batch_size and patches_per_side must be at least 1, got {batch_size}, {patches_per_side}.")
    return _generate(split, seed, batch_size, start, image_size, patches_per_side, device, varied, shared_only)


def _generate(
    split: str,
    seed: int,
    batch_size: int,
    start: int,
    image_size: int,
    patches_per_side: int,
    device: str | torch.device,
    varied: bool,
    shared_only: bool,
) -> Iterator[EmojiBatch]:
    while True:
        indices = np.arange(start, start + batch_size)
        scenes = sample_scenes(split, seed, indices, shared_only)
        looks = draw_looks(split, seed, indices) if varied else None
        yield EmojiBatch(
            render_scenes(scenes, image_size, device, looks),
            label_patches(scenes, patches_per_side, device, looks),
            scenes,
        )
        start += batch_size


def _text_rng(split: str, seed: int, index: int, purpose: int) -> PortableRng:
    return PortableRng(seed, SPLITS.index(split), index, purpose)


def _check(split: str, seed: int, image_size: int, num_scenes: int) -> None:
    """Checks arguments at once, not when the first scene is made."""
    rng_for(split, seed, 0)
    check_image_size(image_size)
    if num_scenes < 0:
        raise ValueError(f"num_scenes and start must not be negative, got {num_scenes}.")


def _features(datasets: Any) -> Any:
    text, number = datasets.Value("string"), datasets.Value("int32")
    item = dict.fromkeys(("concept", "artist", "size", "place"), text)
    item |= dict.fromkeys(("side", "x", "y", "angle"), number) | {"is_flipped": datasets.Value("bool")}
    return datasets.Features(
        {
            "image": datasets.Image(),
            "text": text,
            "questions": [{"question": text, "answer": text, "kind": text}],
            "scene": {"background": text, "objects": [item], "gradient": number, "screenshot": number},
        }
    )
