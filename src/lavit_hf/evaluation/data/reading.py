"""Finds out which format data has, and reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.worlds import WORLDS
from ...utils.json_files import read_json
from .benchmarks import (
    is_coco,
    is_gqa,
    is_karpathy,
    is_vizwiz,
    is_vqav2,
    read_coco,
    read_gqa,
    read_karpathy,
    read_vizwiz,
    read_vqav2,
)
from .samples import Columns, EvaluationData, EvaluationSample, TableSamples, UnfitDataError, read_scenes

_SAFE = re.compile(r"[\w.-]+")  # ids become names of files


def read_data(
    name: str,
    task: str,
    *,
    split: str | None = None,
    num_samples: int | None = None,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    columns: Sequence[str] = Columns(),
    config: str | None = None,
    revision: str | None = None,
) -> EvaluationData:
    """Reads data for a task.

    Args:
        name: `"scenes"`, `"emoji"` or `"emoji-small"`; a benchmark's JSON file (COCO, NoCaps or Karpathy captions,
            VQAv2, OK-VQA, GQA or VizWiz questions), recognized by what is in it; or a dataset as for `load_data`.
        task: Name of the task.
        split: Of scenes and emoji one of theirs, by default `"validation"`; of Karpathy's files and of datasets by
            default `"test"`. Other formats have none.
        num_samples: How many images (of files of questions: how many questions) at most, the first ones.
        images: Folder that the images of a file are in; by default where the file is.
        annotations: The file with the answers to the questions of VQAv2 and OK-VQA.
        columns: Those of a dataset, in the order of `Columns`.
        config: Which configuration of a dataset on the Hub.
        revision: Which revision of a dataset on the Hub.

    Returns:
        The samples.

    Raises:
        UnfitDataError: The data do not have what the task needs.
        ValueError: Something does not exist or is damaged, or was given that these data have no use for.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"The number of samples must be at least 1, got {num_samples}.")
    if task == "editing" and name not in WORLDS:
        raise ValueError(f"The task editing is for made scenes ({', '.join(WORLDS)}), which {name} is not.")
    of_files = {"images": images, "annotations": annotations}
    of_datasets = {
        "columns": columns if Columns(*columns) != Columns() else None,
        "config": config,
        "revision": revision,
    }
    if name in WORLDS:
        _require_no(f"{name}, whose scenes are made,", of_files | of_datasets)
        return read_scenes(task, split, num_samples, WORLDS[name])
    path = Path(name)
    folder = Path(images) if images else None
    try:
        data = _read_benchmark(path, _read_json(path), split, num_samples, folder or path.parent, annotations)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} looks like the file of a benchmark, but is incomplete ({error!r}).") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if data is not None:
        _require_no(f"{name}, the file of a benchmark,", of_datasets)
    else:
        _require_no(f"{name}, a dataset,", {"annotations": annotations})
        split = split or "test"
        table = TableSamples(name, task, split, Columns(*columns), folder, num_samples, config, revision)
        data = EvaluationData(name, split, table)
    _check(data, task)
    return data


def _require_no(what: str, given: Mapping[str, Any]) -> None:
    """Refuses what would be ignored."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{what} has no use for {name}: leave it out ({value!r}).")


def _read_json(path: Path) -> Any:
    """The content of a JSON file, `None` for all else; JSON lines are left to `datasets`."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return read_json(path)
    except OSError as error:
        if error.errno is not None:  # it cannot be read at all
            raise
        return None


def _read_benchmark(
    path: Path,
    content: Any,
    split: str | None,
    num_samples: int | None,
    folder: Path,
    annotations: str | Path | None,
) -> EvaluationData | None:
    if is_karpathy(content):
        split = split or "test"
        return EvaluationData(str(path), split, read_karpathy(content, folder, split, num_samples), is_benchmark=True)
    samples: Sequence[EvaluationSample]
    metric = "exact_match"
    if is_coco(content):
        samples = read_coco(content, folder, num_samples)
    elif is_vqav2(content):
        if annotations is None:
            raise ValueError("it holds questions; --annotations takes the file with their answers.")
        if (answers := _read_json(Path(annotations))) is None:
            raise ValueError(f"--annotations takes a JSON file, which {annotations} is not.")
        samples, metric = read_vqav2(content, answers, folder, num_samples), "vqa_accuracy"
    elif is_gqa(content):
        samples = read_gqa(content, folder, num_samples)
    elif is_vizwiz(content):
        samples, metric = read_vizwiz(content, folder, num_samples), "vqa_accuracy"
    else:
        return None
    if split is not None:
        raise ValueError("it is of one split; leave --split out.")
    return EvaluationData(str(path), None, samples, answer_metric=metric, is_benchmark=True)


def _check(data: EvaluationData, task: str) -> None:
    if not len(data.samples):
        raise ValueError(f"{data.name} holds no samples.")
    if task == "vqa" and data.samples[0].question is None:
        raise UnfitDataError(f"{data.name} holds no questions, which the task vqa needs.")
    if task in ("caption", "text-to-image") and (data.samples[0].question or not data.samples[0].references):
        raise UnfitDataError(f"{data.name} holds no captions, which the task {task} needs.")
    if isinstance(data.samples, TableSamples):
        return  # numbered by us
    seen: set[str] = set()
    for sample in data.samples:
        if sample.id in seen:
            raise ValueError(f"{data.name} has two samples with the id {sample.id}.")
        if not _SAFE.fullmatch(sample.id):
            raise ValueError(f"{data.name}: the id {sample.id!r} cannot be the name of a file.")
        seen.add(sample.id)


__all__ = ["read_data"]
