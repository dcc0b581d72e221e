"""Makes the dataset of a stage: for stage 2 pictures of scenes with captions, questions, layouts, and changes to draw.

    python examples/worlds/make_dataset.py --output_dir out/lavit-scenes/dataset --num_rows 60000

With `--drawn_by ARTIST --visual_tokenizer DIR` one artist draws all that is to be drawn: rows have the codes of the
scene as that artist draws it, beside the picture that is read, by anybody. The other stages have datasets of their own
only if one artist draws. That of `--stage 1` has pictures by anybody (`image`), one time in four by that artist, and
that artist's picture of the same scene (`target_image`): codes learn what it looks like there, and need not tell
artists apart. That of `--stage 3` has drawings by that artist (`image`), and codes of their scenes, one time in two as
others drew them.

Rows of stage 2 are captions (`images`, `text`), conversations of some questions and answers about a picture (`images`,
`messages`), and drawings from a prompt (`images`, `prompt`, `text`): from a layout, which lists all objects and their
places, or after a picture, words that change it (other objects, or another background). Layouts are asked for in
conversations, too. No other text says as much in as few words about what belongs together, so that binding is learned
from them first.

With `--listing_share 1` rows ask for nothing but layouts. A language model that begins with these learns within some
hundred updates to find in the picture what a word names: the place that follows the name of the object that happens to
come first can be known in no other way. One that begins with captions may never learn it, as it can choose a place
first and then name what is there; such a model knows neither where a thing is nor whether there is one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import HfArgumentParser

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer
from lavit_hf.data.scenes import MAX_OBJECTS, PortableRng
from lavit_hf.data.worlds import World, find_world
from lavit_hf.training import exit_on_write_errors

_PURPOSE = 1000  # the third key of these random choices; scenes have four keys
_ROWS_AT_A_TIME = 2000
_PICTURES_AT_A_TIME = 64
_TRIES = 50  # to find a change that the artist can draw
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
    small_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of rows that are about a scene whose objects are small, at least most of them. Codes tell "
            "least of these, as a few patches are little of the loss."
        },
    )
    question_share: float = field(default=0.3, metadata={"help": "Share of rows with questions."})
    layout_share: float = field(default=0.2, metadata={"help": "Share of rows with a layout to draw."})
    change_share: float = field(default=0.05, metadata={"help": "Share of rows with a changed picture to draw."})
    listing_share: float = field(
        default=0.0, metadata={"help": "Share of rows that ask what is where, and for nothing else."}
    )
    any_order_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the layouts in conversations that list things in any order, which teaches to find what "
            "is named. The others have the order of reading, which teaches to name what is at a place."
        },
    )
    drawn_by: str | None = field(default=None, metadata={"help": "The artist who draws all that is to be drawn."})
    visual_tokenizer: str | None = field(default=None, metadata={"help": "What gives drawings by that artist codes."})
    stage: int = field(default=2, metadata={"help": "What the rows are for: 1, 2 or 3.", "choices": [1, 2, 3]})
    num_validation_rows: int = field(
        default=256, metadata={"help": "Of the stages 1 and 3: rows of the split `validation`."}
    )


@dataclass
class Row:
    """A row of stage 2 without pictures, and the scenes of its images.

    Attributes:
        values: Its other columns.
        scenes: What its images show, as they are read.
        is_drawn: Which of them can become something to draw.
    """

    values: dict[str, Any]
    scenes: list[Any]
    is_drawn: list[bool]


def make_row(args: Arguments, index: int) -> Row:
    """Row `index`: what it is follows from seed and index alone."""
    world = find_world(args.world)
    scene, rng = choose_scene(args, index), PortableRng(args.seed, index, _PURPOSE)
    row: dict[str, Any] = {"text": None, "prompt": None, "messages": None, "sample_id": index}
    kind = rng.below(1_000_000) / 1_000_000
    if kind >= 1 - args.listing_share:
        messages = to_messages([(_LAYOUT_QUESTION, world.write_layout(scene, rng))])
        return Row(row | {"messages": messages}, [scene], [False])
    if kind < args.question_share:
        return Row(row | {"messages": converse(world, scene, rng, args.any_order_share)}, [scene], [False])
    if kind < args.question_share + args.layout_share:
        return Row(row | {"prompt": world.write_layout(scene), "text": "<image>"}, [scene], [True])
    if kind < args.question_share + args.layout_share + args.change_share:
        change, changed = choose_change(args, scene, rng)
        return Row(row | {"prompt": f"<image>{change}", "text": "<image>"}, [scene, changed], [False, True])
    return Row(row | {"text": world.write_caption(scene, rng)}, [scene], [True])


def choose_scene(args: Arguments, index: int, split: int = 0) -> Any:
    """The scene of this index, or the next one that has what the row wants, and that can be drawn.

    No two rows have one in common.
    """
    wants_many, wants_small = (
        PortableRng(args.seed, index, _PURPOSE + purpose).below(1_000_000) < share * 1_000_000
        for purpose, share in ((1, args.many_share), (2, args.small_share))
    )
    world = find_world(args.world)
    while True:
        scene = world.sample_scene(world.splits[split], args.seed, index)
        is_wanted = world.num_objects(scene) == MAX_OBJECTS or not wants_many
        if is_wanted and (is_small(scene) or not wants_small) and as_drawn(args, scene) is not None:
            return scene
        index += args.num_rows


def is_small(scene: Any) -> bool:
    """Whether most of its objects are small."""
    return 2 * sum(item.size == "small" for item in scene.objects) > len(scene.objects)


def choose_change(args: Arguments, scene: Any, rng: PortableRng) -> tuple[str, Any]:
    """Words for a change that the artist can draw, and the scene after it."""
    for _ in range(_TRIES):
        change, changed, _ = find_world(args.world).change_scene(scene, rng)
        if as_drawn(args, changed) is not None:
            return change, changed
    raise SystemExit(f"{args.drawn_by} can draw none of {_TRIES} changes of {scene}: choose another --drawn_by.")


def as_drawn(args: Arguments, scene: Any) -> Any | None:
    """The scene as it is to be drawn; `None` if it cannot be."""
    return scene if args.drawn_by is None else find_world(args.world).redraw(scene, args.drawn_by)


def converse(world: World, scene: Any, rng: PortableRng, any_order_share: float) -> list[dict[str, Any]]:
    """Questions of all kinds; as many as one in two are for yes or no, of which there are the most sorts.

    One conversation in two ends with the layout; before, it would answer the questions.
    """
    claims = [world.ask_questions(scene, rng)[-1] for _ in range(_QUESTIONS)]
    others = rng.shuffled(world.ask_questions(scene, rng)[:-1])[:_QUESTIONS]
    asked = [(question, answer) for question, answer, _ in rng.shuffled(list(dict.fromkeys(claims + others)))]
    if rng.below(2):
        is_in_any_order = rng.below(1_000_000) < any_order_share * 1_000_000
        asked.append((_LAYOUT_QUESTION, world.write_layout(scene, rng if is_in_any_order else None)))
    return to_messages(asked)


def to_messages(asked: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Questions and answers about a picture as a conversation."""
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


class Coder:
    """Gives pictures their codes, a batch at a time."""

    def __init__(self, path: str) -> None:
        self.visual_tokenizer = LavitVisualTokenizer.from_pretrained(path).eval()
        self.image_processor = LavitImageProcessorPil.from_pretrained(path)

    @torch.no_grad()
    def encode(self, pictures: list[Image.Image]) -> list[list[int]]:
        """The codes of each picture."""
        found: list[list[int]] = []
        for start in range(0, len(pictures), _PICTURES_AT_A_TIME):
            batch = self.image_processor(pictures[start : start + _PICTURES_AT_A_TIME], return_tensors="pt")
            output = self.visual_tokenizer.encode(batch["pixel_values"])
            found += [codes.tolist() for codes in output.codes.split(output.num_tokens.tolist())]
        return found


def complete_rows(args: Arguments, rows: list[Row], coder: Coder | None) -> list[dict[str, Any]]:
    """Rows of stage 2 with their pictures, and with codes where something is drawn by one artist."""
    world = find_world(args.world)
    pictures = [[world.render(scene) for scene in row.scenes] for row in rows]
    complete = [
        row.values | {"images": [to_png(picture) for picture in of_row]}
        for row, of_row in zip(rows, pictures, strict=True)
    ]
    if coder is None:
        return complete
    # An image of a prompt to draw from enters as codes, too: those of the picture as it is.
    encoded = [
        world.render(as_drawn(args, scene)) if is_drawn else picture
        for row, of_row in zip(rows, pictures, strict=True)
        if any(row.is_drawn)
        for scene, is_drawn, picture in zip(row.scenes, row.is_drawn, of_row, strict=True)
    ]
    codes = iter(coder.encode(encoded))
    return [
        values | {"codes": [next(codes) for _ in row.scenes] if any(row.is_drawn) else None}
        for row, values in zip(rows, complete, strict=True)
    ]


def make_pairs(args: Arguments, indices: range, split: int) -> list[dict[str, Any]]:
    """Rows of stage 1: pictures, and the same scene by one artist, who drew every fourth of the pictures, too."""
    world = find_world(args.world)
    rows = []
    for index in indices:
        scene = choose_scene(args, index, split)
        target = to_png(world.render(as_drawn(args, scene)))
        rows.append({"image": to_png(world.render(scene)) if index % 4 else target, "target_image": target})
    return rows


def make_pixel_rows(args: Arguments, indices: range, coder: Coder, split: int) -> list[dict[str, Any]]:
    """Rows of stage 3: drawings by one artist, and codes of their scenes, every other one as it was before."""
    world = find_world(args.world)
    scenes = [choose_scene(args, index, split) for index in indices]
    drawings = [world.render(as_drawn(args, scene)) for scene in scenes]
    encoded = [
        world.render(scene) if index % 2 else drawing
        for index, scene, drawing in zip(indices, scenes, drawings, strict=True)
    ]
    return [
        {"image": to_png(drawing), "codes": [codes]}
        for drawing, codes in zip(drawings, coder.encode(encoded), strict=True)
    ]


def features(args: Arguments) -> datasets.Features:
    """Columns of the dataset."""
    text, codes = datasets.Value("string"), datasets.List(datasets.List(datasets.Value("int32")))
    if args.stage == 1:
        return datasets.Features({"image": datasets.Image(), "target_image": datasets.Image()})
    if args.stage == 3:
        return datasets.Features({"image": datasets.Image(), "codes": codes})
    return datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "text": text,
            "prompt": text,
            "messages": datasets.List({"role": text, "content": datasets.List({"type": text, "text": text})}),
            "sample_id": datasets.Value("int64"),
            **({} if args.visual_tokenizer is None else {"codes": codes}),
        }
    )


def chunks(args: Arguments, coder: Coder | None, split: int = 0) -> Iterator[datasets.Dataset]:
    """The dataset in parts, because rows as Python objects take many times the memory."""
    num_rows = args.num_validation_rows if split else args.num_rows
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
        indices = range(start, min(start + _ROWS_AT_A_TIME, num_rows))
        if args.stage == 1:
            rows = make_pairs(args, indices, split)
        elif args.stage == 3:
            assert coder is not None  # see `check`
            rows = make_pixel_rows(args, indices, coder, split)
        else:
            rows = complete_rows(args, [make_row(args, index) for index in indices], coder)
        yield datasets.Dataset.from_list(rows, features=features(args))


def make_dataset(args: Arguments) -> datasets.Dataset | datasets.DatasetDict:
    """All rows; those of the stages 1 and 3 in two splits."""
    coder = None if args.visual_tokenizer is None else Coder(args.visual_tokenizer)
    if args.stage == 2:
        return datasets.concatenate_datasets(list(chunks(args, coder)))
    parts = {name: list(chunks(args, coder, split)) for split, name in enumerate(("train", "validation"))}
    return datasets.DatasetDict({name: datasets.concatenate_datasets(part) for name, part in parts.items() if part})


def check(args: Arguments) -> None:
    """Refuses options that do not go together."""
    if args.stage != 2 and args.drawn_by is None:
        script = "train_tokenizer.py" if args.stage == 1 else "train_pixel_decoder.py"
        raise SystemExit(
            f"--stage {args.stage} is for what one artist draws: name the artist, --drawn_by. For pictures as they "
            f"are, {script} takes --dataset WORLD."
        )
    if args.stage == 1 and args.visual_tokenizer is not None:
        raise SystemExit("--stage 1 is what a visual tokenizer learns from: leave out --visual_tokenizer.")
    if args.stage != 1 and (args.drawn_by is None) != (args.visual_tokenizer is None):
        raise SystemExit(
            "--drawn_by and --visual_tokenizer go together: who draws, and what gives drawings their codes."
        )


def main(arguments: list[str] | None = None) -> None:
    """Makes the dataset."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(arguments)
    check(args)
    make_dataset(args).save_to_disk(args.output_dir)


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
