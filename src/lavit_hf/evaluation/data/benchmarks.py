"""Readers for the annotation files of public benchmarks: one pair of functions per format.

`is_NAME` recognizes a format by its content, and `read_NAME` makes samples of it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...processing.tokenization_lavit import check_text
from ...utils.paths import resolve_inside
from .samples import EvaluationSample

_NAMES = {int: "an integer", str: "a text", list: "a list"}
_T = TypeVar("_T", int, str, list)


def read_field(row: Any, name: str, kind: type[_T], where: str) -> _T:
    """Reads a field of a row.

    Args:
        row: The row, which should be an object of JSON.
        name: The field.
        kind: `int`, `str` or `list`.
        where: What the row is, such as `"images[7]"`, for the error.

    Raises:
        ValueError: If it is missing, or something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r:.60} instead of an object with {name}.")
    if name not in row:
        raise ValueError(f"{where} is incomplete: it has no {name}.")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name} is {value!r:.60}, expected {_NAMES[kind]}.")
    try:
        check_text(value if isinstance(value, str) else None)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from error
    return value


def read_texts(row: Any, name: str, part: str, where: str) -> tuple[str, ...]:
    """Reads the texts in a field that holds a list of objects with one text each, such as `[{"answer": "yes"}]`.

    Raises:
        ValueError: If it is something else, or empty.
    """
    parts = read_field(row, name, list, where)
    if not parts:
        raise ValueError(f"{where}: {name} is empty.")
    return tuple(read_field(one, part, str, f"{where}, {name}[{index}]") for index, one in enumerate(parts))


def read_kind(row: Mapping[str, Any], name: str, where: str) -> str:
    """Reads the kind of a question, which is `"other"` where a row has none."""
    return "other" if row.get(name) is None else read_field(row, name, str, where)


def find_image(folder: Path, row: str, *names: str) -> str:
    """Returns the path of the first of these files that exists in a folder.

    Args:
        folder: Where to look; files elsewhere are not used, whatever their names say.
        row: The row that names them, such as `"Question 7"`, for the error.
        names: Relative to the folder.

    Raises:
        ValueError: None does, or a name leads out of the folder.
    """
    for name in names:
        if os.path.isfile(path := resolve_inside(folder, name, row)):
            return str(path)
    raise ValueError(f"{row}: {folder} has no {names[0]:.100}; --images takes the folder that the images are in.")


def is_karpathy(content: Any) -> bool:
    """Tells whether this is `{"images": [{"imgid", "filename", "split", "sentences": [{"raw"}]}]}`."""
    return isinstance(content, dict) and bool(content.get("images")) and "sentences" in content["images"][0]


def read_karpathy(
    content: dict[str, Any], folder: Path, split: str, num_samples: int | None = None
) -> list[EvaluationSample]:
    """Makes one sample per image of a split.

    Args:
        content: The file.
        folder: Where the images are; those of COCO also in folders of their own there, such as `val2014`.
        split: `"train"`, `"val"`, `"test"`, or whatever the file has.
        num_samples: How many at most.

    Raises:
        ValueError: There is no such split, a field is missing or of another type, or an image is missing in `folder`.
    """
    rows = [(f"images[{index}]", image) for index, image in enumerate(content["images"])]
    splits = [read_field(image, "split", str, where) for where, image in rows]
    if split not in splits:
        raise ValueError(f"The file has no split {split!r}; it has {', '.join(sorted(set(splits)))}.")
    chosen = [row for row, of in zip(rows, splits, strict=True) if of == split]
    return [_read_image(image, folder, where) for where, image in chosen[:num_samples]]


def _read_image(image: dict[str, Any], folder: Path, where: str) -> EvaluationSample:
    number, name = read_field(image, "imgid", int, where), read_field(image, "filename", str, where)
    return EvaluationSample(
        f"{number:012d}",
        # Those of COCO are also in folders of their own.
        find_image(folder, f"Image {number}", name, f"{image.get('filepath', '.')}/{name}"),
        references=read_texts(image, "sentences", "raw", where),
    )


def is_coco(content: Any) -> bool:
    """Tells whether this is `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`."""
    if not isinstance(content, dict) or not content.get("images") or not content.get("annotations"):
        return False
    return "caption" in content["annotations"][0]


def read_coco(content: dict[str, Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """Makes one sample per image that has captions, in order of image ids.

    Raises:
        ValueError: A field is missing or of another type, or an image is missing in `folder`.
    """
    captions = defaultdict(list)
    for index, annotation in enumerate(content["annotations"]):
        where = f"annotations[{index}]"
        number = read_field(annotation, "image_id", int, where)
        captions[number].append(read_field(annotation, "caption", str, where))
    images = []
    for index, image in enumerate(content["images"]):
        where = f"images[{index}]"
        number = read_field(image, "id", int, where)
        if number in captions:
            images.append((number, read_field(image, "file_name", str, where)))
    return [
        EvaluationSample(
            f"{number:012d}", find_image(folder, f"Image {number}", name), references=tuple(captions[number])
        )
        for number, name in sorted(images)[:num_samples]
    ]


def is_vqav2(content: Any) -> bool:
    """Tells whether this is `{"questions": [{"question_id", "image_id", "question"}]}`."""
    return isinstance(content, dict) and bool(content.get("questions")) and "question_id" in content["questions"][0]


def read_vqav2(
    content: dict[str, Any], annotations: dict[str, Any], folder: Path, num_samples: int | None = None
) -> list[EvaluationSample]:
    """Makes one sample per question, in the file's order.

    Args:
        content: The file of questions.
        annotations: The file of answers, ten per question.
        folder: Where the images are, named as COCO names them.
        num_samples: How many at most.

    Raises:
        ValueError: A question has no answers, a field is missing or of another type, or an image is not in `folder`.
    """
    answers = {}
    for index, annotation in enumerate(read_field(annotations, "annotations", list, "The file of --annotations")):
        where = f"annotations[{index}] of --annotations"
        answers[read_field(annotation, "question_id", int, where)] = (annotation, where)
    subtype = content.get("data_subtype", "val2014")
    samples = []
    for index, asked in enumerate(content["questions"][:num_samples]):
        where = f"questions[{index}]"
        question_id = read_field(asked, "question_id", int, where)
        if question_id not in answers:
            raise ValueError(f"Question {question_id} has no answers; are --annotations of the same split?")
        annotation, where_answered = answers[question_id]
        number = f"{read_field(asked, 'image_id', int, where):012d}"
        samples.append(
            EvaluationSample(
                f"{question_id:012d}",
                find_image(folder, f"Question {question_id}", f"COCO_{subtype}_{number}.jpg", f"{number}.jpg"),
                references=read_texts(annotation, "answers", "answer", where_answered),
                question=read_field(asked, "question", str, where),
                meta={"kind": read_kind(annotation, "answer_type", where_answered)},
            )
        )
    return samples


def is_gqa(content: Any) -> bool:
    """Tells whether this is `{question id: {"imageId", "question", "answer"}}`."""
    if not isinstance(content, dict) or not content:
        return False
    value = next(iter(content.values()))
    return isinstance(value, dict) and "imageId" in value and "question" in value


def read_gqa(content: dict[str, Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """Makes one sample per question, in the file's order.

    Raises:
        ValueError: A question has no answer, a field is missing or of another type, or an image is not in `folder`.
    """
    samples = []
    for question_id, asked in list(content.items())[:num_samples]:
        where = f"Question {question_id}"
        question = read_field(asked, "question", str, where)
        if "answer" not in asked:
            raise ValueError(f"{where} has no answer; GQA publishes those of val and testdev only.")
        samples.append(
            EvaluationSample(
                question_id,
                find_image(folder, where, f"{read_field(asked, 'imageId', str, where)}.jpg"),
                references=(read_field(asked, "answer", str, where),),
                question=question,
                meta={"kind": read_kind(asked.get("types") or {}, "structural", where)},
            )
        )
    return samples


def is_vizwiz(content: Any) -> bool:
    """Tells whether this is `[{"image", "question", "answers": [{"answer"}]}]`."""
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return False
    answers: Any = content[0].get("answers")
    return bool(answers) and isinstance(answers[0], dict) and {"image", "question"} <= set(content[0])


def read_vizwiz(content: list[Any], folder: Path, num_samples: int | None = None) -> list[EvaluationSample]:
    """Makes one sample per question, in the file's order.

    Raises:
        ValueError: A field is missing or of another type, or an image is missing in `folder`.
    """
    samples = []
    for index, asked in enumerate(content[:num_samples]):
        where = f"Question {index}"
        image = read_field(asked, "image", str, where)
        samples.append(
            EvaluationSample(
                Path(image).stem,
                find_image(folder, where, image),
                references=read_texts(asked, "answers", "answer", where),
                question=read_field(asked, "question", str, where),
                meta={"kind": read_kind(asked, "answer_type", where)},
            )
        )
    return samples


__all__ = ["read_field", "read_kind", "read_texts"]
