"""Makes the dataset of stage 2: pictures of scenes with captions, questions, layouts, and changes to draw.

    python examples/worlds/make_dataset.py --output_dir out/lavit-scenes/dataset --num_rows 60000

Rows are captions (`images`, `text`), conversations of some questions and answers about a picture (`images`,
`messages`), and drawings from a prompt (`images`, `prompt`, `text`): from a layout, which lists all objects and their
places, or after a picture, words that
change it (other objects, or another background). Layouts are asked for in conversations, too. No
other text says as much in as few words about what belongs together, so that binding is learned from them first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
from PIL import Image
from transformers import HfArgumentParser

from lavit_hf.data.scenes import MAX_OBJECTS, PortableRng
from lavit_hf.data.worlds import World, find_world
from lavit_hf.training import exit_on_write_errors

_PURPOSE = 1000  # of the rng; those of scenes are far below
_ROWS_AT_A_TIME = 2000
_QUESTIONS = 4  # in a conversation of yes or no, and as many others
_LAYOUT_QUESTION = "What is where?"


@dataclass
class Arguments:
    """What to make."""

    output_dir: str = field(metadata={"help": "Where the dataset goes."})
    world: str = field(default="scenes", metadata={"help": "What the rows are about: scenes or emoji."})
    num_rows: int = field(default=60_000, metadata={"help": "How many rows."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})
    many_share: float = field(
        default=0.0, metadata={"help": "Share of rows that are about a scene with as many objects as there can be."}
    )
    question_share: float = field(default=0.3, metadata={"help": "Share of rows with questions."})
    layout_share: float = field(default=0.2, metadata={"help": "Share of rows with a layout to draw."})
    change_share: float = field(default=0.05, metadata={"help": "Share of rows with a changed picture to draw."})


def make_row(args: Arguments, index: int) -> dict[str, Any]:
    """Row `index`: what it is follows from seed and index alone."""
    world = find_world(args.world)
    scene, rng = choose_scene(args, index), PortableRng(args.seed, index, _PURPOSE)
    row: dict[str, Any] = {"images": [scene], "text": None, "prompt": None, "messages": None, "sample_id": index}
    kind = rng.below(1_000_000) / 1_000_000
    if kind < args.question_share:
        row["messages"] = converse(world, scene, rng)
    elif kind < args.question_share + args.layout_share:
        row |= {"prompt": world.write_layout(scene), "text": "<image>"}
    elif kind < args.question_share + args.layout_share + args.change_share:
        change, changed, _ = world.change_scene(scene, rng)
        row["images"].append(changed)
        row |= {"prompt": f"<image>{change}", "text": "<image>"}
    else:
        row["text"] = world.write_caption(scene, rng)
    return row | {"images": [to_png(world.render(one)) for one in row["images"]]}


def choose_scene(args: Arguments, index: int) -> Any:
    """The scene of this index, or the next one that has many objects; no two rows have one in common."""
    wants_many = PortableRng(args.seed, index, _PURPOSE + 1).below(1_000_000) < args.many_share * 1_000_000
    world = find_world(args.world)
    scene = world.sample_scene(world.splits[0], args.seed, index)
    while wants_many and world.num_objects(scene) < MAX_OBJECTS:
        index += args.num_rows
        scene = world.sample_scene(world.splits[0], args.seed, index)
    return scene


def converse(world: World, scene: Any, rng: PortableRng) -> list[dict[str, Any]]:
    """Questions of all kinds; as many as one in two are for yes or no, of which there are the most sorts.

    One conversation in two ends with the layout; before, it would answer the questions.
    """
    claims = [world.ask_questions(scene, rng)[-1] for _ in range(_QUESTIONS)]
    others = rng.shuffled(world.ask_questions(scene, rng)[:-1])[:_QUESTIONS]
    asked = [(question, answer) for question, answer, _ in rng.shuffled(list(dict.fromkeys(claims + others)))]
    if rng.below(2):
        asked.append((_LAYOUT_QUESTION, world.write_layout(scene)))
    messages: list[dict[str, Any]] = []
    for question, answer in asked:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return messages


def to_png(picture: Image.Image) -> dict[str, Any]:
    """The picture as `datasets.Image` stores it."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
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
