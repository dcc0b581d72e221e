"""Makes the dataset of stage 2: pictures of scenes with captions, questions, layouts, and changes to draw.

    python examples/lavit_scenes/make_dataset.py --output_dir out/lavit-scenes/dataset --num_rows 60000

Rows are captions (`images`, `text`), conversations of some questions and answers about a picture (`images`,
`messages`), and drawings from a prompt (`images`, `prompt`, `text`): from a layout, which lists all objects and their
places, or after a picture, the same objects on another background. Layouts are asked for in conversations, too. No
other text says as much in as few words about what belongs together, so that binding is learned from them first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from transformers import HfArgumentParser

from lavit_hf.data.scenes import (
    BACKGROUNDS,
    MAX_OBJECTS,
    PortableRng,
    Scene,
    ask_questions,
    place_of,
    render,
    sample_scene,
    write_caption,
)
from lavit_hf.training import exit_on_write_errors

_PURPOSE = 1000  # of the rng; those of scenes are far below
_ROWS_AT_A_TIME = 2000
_QUESTIONS = 4  # in a conversation of yes or no, and as many others
_LAYOUT_QUESTION = "What is where?"


@dataclass
class Arguments:
    """What to make."""

    output_dir: str = field(metadata={"help": "Where the dataset goes."})
    num_rows: int = field(default=60_000, metadata={"help": "How many rows."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})
    many_share: float = field(
        default=0.0, metadata={"help": "Share of rows that are about a scene with as many objects as there can be."}
    )
    question_share: float = field(default=0.3, metadata={"help": "Share of rows with questions."})
    layout_share: float = field(default=0.2, metadata={"help": "Share of rows with a layout to draw."})
    change_share: float = field(default=0.05, metadata={"help": "Share of rows with another background to draw."})


def make_row(args: Arguments, index: int) -> dict[str, Any]:
    """Row `index`: what it is follows from seed and index alone."""
    scene, rng = choose_scene(args, index), PortableRng(args.seed, index, _PURPOSE)
    row: dict[str, Any] = {"images": [scene], "text": None, "prompt": None, "messages": None, "sample_id": index}
    kind = rng.below(1_000_000) / 1_000_000
    if kind < args.question_share:
        row["messages"] = converse(scene, rng)
    elif kind < args.question_share + args.layout_share:
        row |= {"prompt": describe_layout(scene), "text": "<image>"}
    elif kind < args.question_share + args.layout_share + args.change_share:
        used = {scene.background, *(item.color for item in scene.objects)}
        background = rng.choice([name for name in BACKGROUNDS if name not in used])
        row["images"].append(replace(scene, background=background))
        row |= {"prompt": f"<image>on a {background} background", "text": "<image>"}
    else:
        row["text"] = write_caption(scene, rng)
    return row | {"images": [to_png(one) for one in row["images"]]}


def choose_scene(args: Arguments, index: int) -> Scene:
    """The scene of this index, or the next one that has many objects; no two rows have one in common."""
    wants_many = PortableRng(args.seed, index, _PURPOSE + 1).below(1_000_000) < args.many_share * 1_000_000
    scene = sample_scene("train", args.seed, index)
    while wants_many and len(scene.objects) < MAX_OBJECTS:
        index += args.num_rows
        scene = sample_scene("train", args.seed, index)
    return scene


def describe_layout(scene: Scene) -> str:
    """All objects in reading order, each with its place, then the background."""
    objects = [f"{item.size} {item.color} {item.shape} {place_of(item)}" for item in scene.objects]
    return ", ".join([*objects, f"{scene.background} background"])


def converse(scene: Scene, rng: PortableRng) -> list[dict[str, Any]]:
    """Questions of all kinds; as many as one in two are for yes or no, of which there are the most sorts.

    One conversation in two ends with the layout; before, it would answer the questions.
    """
    claims = [ask_questions(scene, rng)[-1] for _ in range(_QUESTIONS)]
    others = rng.shuffled(ask_questions(scene, rng)[:-1])[:_QUESTIONS]
    asked = [(question, answer) for question, answer, _ in rng.shuffled(list(dict.fromkeys(claims + others)))]
    if rng.below(2):
        asked.append((_LAYOUT_QUESTION, describe_layout(scene)))
    messages: list[dict[str, Any]] = []
    for question, answer in asked:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return messages


def to_png(scene: Scene) -> dict[str, Any]:
    """The picture as `datasets.Image` stores it."""
    file = io.BytesIO()
    render(scene).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def features() -> datasets.Features:
    """Columns of the dataset."""
    text = datasets.Value("string")
    return datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "text": text,
            "prompt": text,
            "messages": datasets.List({"role": text, "content": datasets.List({"type": text, "text": text})}),
            "sample_id": datasets.Value("int64"),
        }
    )


def chunks(args: Arguments) -> Iterator[datasets.Dataset]:
    """The dataset in parts, because rows as Python objects take many times the memory."""
    for start in range(0, args.num_rows, _ROWS_AT_A_TIME):
        rows = [make_row(args, index) for index in range(start, min(start + _ROWS_AT_A_TIME, args.num_rows))]
        yield datasets.Dataset.from_list(rows, features=features())


def main(arguments: list[str] | None = None) -> None:
    """Makes the dataset."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    datasets.concatenate_datasets(list(chunks(args))).save_to_disk(args.output_dir)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
