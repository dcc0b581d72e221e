"""What the tasks that draw have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...data.scenes import Scene, facts_of, judge
from ...processing.image_processing_pil_lavit import load_image
from ...utils.paths import resolve_inside
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement
from ..scenes.facts import Comparison, compare_facts, measure_facts, wrong_parts
from .base import Record, Shown


def open_picture(record: Record, folder: Path) -> Image.Image:
    """What was drawn.

    Raises:
        ValueError: The file is missing, no image, too large to be decoded safely, or elsewhere.
    """
    with load_image(picture_path(record, folder)) as picture:
        return picture.convert("RGB")


def picture_path(record: Record, folder: Path) -> Path:
    """Where it is.

    Raises:
        ValueError: The record, which a file may hold from before, names a file elsewhere.
    """
    return resolve_inside(folder, record["picture"], f"The prediction of {record['id']}")


def score_scenes(data: EvaluationData, records: Sequence[Record], folder: Path) -> dict[str, Measurement]:
    """What a program, which knows nothing of the model, sees in drawings of scenes.

    The same program's opinion on the true pictures, `judge_on_truth`, is the most that drawings could reach.
    """
    drawn = [_judge(open_picture(record, folder), record) for record in records]
    true = [_judge(data.samples[index].open_image(), record) for index, record in enumerate(records)]
    return {**measure_facts(drawn), **measure_facts(true, "judge_on_truth/")}


def show_scene(
    data: EvaluationData, sample: EvaluationSample, record: Record, picture: Image.Image, lines: list[tuple[str, str]]
) -> Shown:
    """A drawing beside the sample's own picture, and if that is a scene what is wrong about it."""
    shown = Shown([("original", sample.open_image()), ("drawn", picture)], lines)
    if data.is_scenes:
        wrong = wrong_parts(_judge(picture, record))
        shown.is_right = not wrong
        shown.lines += [("wrong", ", ".join(wrong))] if wrong else []
    return shown


def _judge(picture: Image.Image, record: Record) -> Comparison:
    return compare_facts(facts_of(judge(picture)), Scene.from_dict(record["meta"]["scene"]))


__all__ = ["open_picture", "picture_path", "score_scenes", "show_scene"]
