"""Scenes, about which everything is known (see `lavit_hf.data.scenes`)."""

from __future__ import annotations

from ...data.scenes import scene_row
from .sample import EvaluationData, EvaluationSample

NAME = "scenes"
_DEFAULT_COUNT = 1000
_SEED = 0  # the validation and held-out scenes are none of the training's, whatever the seeds


def read_scenes(task: str, split: str | None, num_samples: int | None) -> EvaluationData:
    """Makes scenes.

    Args:
        task: For `"vqa"`, a sample is a question, of which a scene has four to seven; otherwise a scene.
        split: `"validation"` (default), `"held_out"` or `"train"`.
        num_samples: How many scenes, by default 1000; more of them begin with the same.

    Raises:
        ValueError: There is no such split.
    """
    split = split or "validation"
    samples = [
        sample
        for index in range(_DEFAULT_COUNT if num_samples is None else num_samples)
        for sample in _read(task, split, index)
    ]
    return EvaluationData(NAME, split, samples, is_scenes=True)


def _read(task: str, split: str, index: int) -> list[EvaluationSample]:
    row = scene_row(split, _SEED, index)
    scene_id = f"{index:06d}"
    if task != "vqa":
        return [EvaluationSample(scene_id, row["image"], (row["text"],), meta={"scene": row["scene"]})]
    return [
        EvaluationSample(
            f"{scene_id}-{asked['kind']}",
            row["image"],
            (asked["answer"],),
            question=asked["question"],
            meta={"kind": asked["kind"]},
        )
        for asked in row["questions"]
    ]
