"""The datasets of made worlds that stages learn from."""

import importlib
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import tiny_models
from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer
from lavit_hf.data import emoji
from lavit_hf.data.scenes import place_of, write_layout
from lavit_hf.training import TrainingDataset

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "worlds"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("make_dataset")


def make_rows(example, count=200, **options) -> list[dict]:
    arguments = example.Arguments("unused", num_rows=count, **options)
    return example.complete_rows(arguments, [example.make_row(arguments, index) for index in range(count)], None)


def test_shares_of_rows(example):
    rows = make_rows(example, question_share=0.3, layout_share=0.2, change_share=0.1)
    found = {
        "questions": sum(row["messages"] is not None for row in rows),
        "layouts": sum(row["prompt"] is not None and len(row["images"]) == 1 for row in rows),
        "changes": sum(len(row["images"]) == 2 for row in rows),
        "captions": sum(row["prompt"] is None and row["text"] is not None for row in rows),
    }
    assert sum(found.values()) == len(rows)
    assert found == pytest.approx({"questions": 60, "layouts": 40, "changes": 20, "captions": 80}, abs=25)
    assert make_rows(example, 3) == make_rows(example, 3)


def test_listings_are_in_any_order(example):
    """What is named first has to be found in the picture, wherever it is."""
    rows = make_rows(
        example, question_share=0.2, layout_share=0.1, change_share=0.1, listing_share=0.5, many_share=1.0
    )
    listings = [row["messages"] for row in rows if row["messages"] is not None and len(row["messages"]) == 2]
    assert len(listings) == pytest.approx(100, abs=25)
    firsts = []
    for question, answer in listings:
        assert question["content"][-1]["text"] == "What is where?"
        firsts.append(answer["content"][0]["text"].split(",")[0].split(" ", 3)[3])
    assert min(firsts.count(place) for place in ("top left", "bottom right")) > 10


def test_layouts_say_everything_in_reading_order(example):
    scene = example.choose_scene(example.Arguments("unused", many_share=1.0), 0)
    *objects, background = write_layout(scene).split(", ")
    assert background == f"{scene.background} background"
    for text, item in zip(objects, scene.objects, strict=True):
        assert text == f"{item.size} {item.color} {item.shape} {place_of(item)}"


def test_half_of_the_conversations_end_with_the_layout(example):
    rows = make_rows(example, question_share=1.0, layout_share=0.0, change_share=0.0)
    questions = [[turn["content"][-1]["text"] for turn in row["messages"][::2]] for row in rows]
    assert 60 < sum(asked[-1] == "What is where?" for asked in questions) < 140
    assert not any("What is where?" in asked[:-1] for asked in questions)
    assert all(row["messages"][0]["content"][0]["type"] == "image" for row in rows)


def test_these_layouts_may_be_in_any_order(example):
    """Unless it is asked for, they are in reading order, as in the rows that published weights learned from."""
    arguments = example.Arguments("unused", num_rows=200, many_share=1.0)

    def sorted_of(**options) -> list[bool]:
        rows = make_rows(example, question_share=1.0, layout_share=0, change_share=0, many_share=1, **options)
        layouts = {
            index: row["messages"][-1]["content"][0]["text"]
            for index, row in enumerate(rows)
            if row["messages"][-2]["content"][-1]["text"] == "What is where?"
        }
        return [text == write_layout(example.choose_scene(arguments, index)) for index, text in layouts.items()]

    usual, half, none = sorted_of(), sorted_of(any_order_share=0.5), sorted_of(any_order_share=1.0)
    assert len(usual) == len(half) == len(none) > 60 and all(usual)
    assert 0 < sum(none) < len(none) / 2 < sum(half) < len(half)  # one in six by chance


def test_claims_are_about_as_common_as_other_questions(example):
    rows = make_rows(example, question_share=1.0, layout_share=0.0, change_share=0.0)
    for row in rows:
        questions = [turn["content"][-1]["text"] for turn in row["messages"][::2]]
        assert len(set(questions)) == len(questions)
        claims = sum(question.startswith("Is ") for question in questions)
        assert 1 <= claims <= 4 == len(questions) - claims - (questions[-1] == "What is where?")


def test_more_rows_about_many_objects(example):
    def count(**options) -> int:
        arguments = example.Arguments("unused", num_rows=100, **options)
        return sum(len(example.choose_scene(arguments, index).objects) == 3 for index in range(100))

    assert count(many_share=1.0) == 100
    assert count() < 60 < count(many_share=0.7) < 100


# One artist draws.


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    """A tiny visual tokenizer; what it makes of a picture is all that matters."""
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.build_visual_tokenizer().save_pretrained(path)
    LavitImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def codes_of(path: Path, picture: Image.Image) -> list[int]:
    pixels = LavitImageProcessorPil.from_pretrained(path)(picture, return_tensors="pt")["pixel_values"]
    return LavitVisualTokenizer.from_pretrained(path).encode(pixels).codes.tolist()


def draw_options(path: Path, **options) -> dict:
    return {"world": "emoji-small", "drawn_by": "noto", "visual_tokenizer": str(path), **options}


def test_one_artist_draws_and_all_are_read(example, tokenizer_path):
    options = draw_options(tokenizer_path, num_rows=24, question_share=0.2, layout_share=0.2, change_share=0.3)
    args = example.Arguments("unused", **options)
    rows = [example.make_row(args, index) for index in range(24)]
    complete = example.complete_rows(args, rows, example.Coder(str(tokenizer_path)))
    assert {len(row.scenes) for row in rows} == {1, 2} and any(values["codes"] is None for values in complete)
    for row, values in zip(rows, complete, strict=True):
        pictures = [Image.open(io.BytesIO(image["bytes"])) for image in values["images"]]
        for picture, scene in zip(pictures, row.scenes, strict=True):
            assert np.array_equal(picture, emoji.render(scene))  # read as it is
        assert (values["codes"] is None) == (values["messages"] is not None)
        for codes, scene, is_drawn in zip(values["codes"] or [], row.scenes, row.is_drawn, strict=False):
            drawn = emoji.redraw(scene, "noto") if is_drawn else scene
            assert codes == codes_of(tokenizer_path, emoji.render(drawn))
    artists = {item.artist for row in rows for scene in row.scenes for item in scene.objects}
    assert len(artists) > 3


def test_what_pixels_are_learned_from(example, tokenizer_path, tmp_path):
    options = [f"--{name}={value}" for name, value in draw_options(tokenizer_path, num_rows=6).items()]
    example.main([*options, "--stage=3", "--num_validation_rows=2", f"--output_dir={tmp_path}"])
    splits = datasets.load_from_disk(str(tmp_path))
    assert len(splits["validation"]) == 2
    rows = splits["train"]
    args = example.Arguments("unused", **draw_options(tokenizer_path, num_rows=6))
    validation = [emoji.sample_scene("validation", 0, index, True) for index in range(0, 600, 6)]
    drawn = next(found for found in (emoji.redraw(scene, "noto") for scene in validation) if found)
    assert np.array_equal(splits["validation"][0]["image"], emoji.render(drawn))
    assert len(rows) == 6 and set(rows.column_names) == {"image", "codes"}
    for index, row in enumerate(rows):
        scene = example.choose_scene(args, index)
        drawn = emoji.redraw(scene, "noto")
        assert np.array_equal(row["image"], emoji.render(drawn))
        assert row["codes"] == [codes_of(tokenizer_path, emoji.render(scene if index % 2 else drawn))]


def test_rows_about_small_objects(example):
    args = example.Arguments("unused", world="emoji-small", num_rows=40, small_share=1.0, many_share=0.5)
    scenes = [example.choose_scene(args, index) for index in range(40)]
    counts = [[item.size == "small" for item in scene.objects] for scene in scenes]
    assert all(sum(count) > len(count) / 2 for count in counts) and {len(count) for count in counts} == {1, 2, 3}
    plain = example.Arguments("unused", world="emoji-small", num_rows=40)
    assert not all(example.is_small(example.choose_scene(plain, index)) for index in range(40))


def test_what_codes_are_learned_from(example, tmp_path):
    options = ["--stage=1", "--world=emoji-small", "--drawn_by=noto", "--num_rows=8", "--num_validation_rows=4"]
    example.main([*options, f"--output_dir={tmp_path}"])
    splits = datasets.load_from_disk(str(tmp_path))
    assert [len(splits[name]) for name in ("train", "validation")] == [8, 4]
    args = example.Arguments("unused", stage=1, world="emoji-small", drawn_by="noto", num_rows=8)
    for index, row in enumerate(splits["train"]):
        scene = example.choose_scene(args, index)
        drawing = emoji.render(emoji.redraw(scene, "noto"))
        assert np.array_equal(row["target_image"], drawing)
        assert np.array_equal(row["image"], emoji.render(scene) if index % 4 else drawing)
    rows = TrainingDataset(splits["train"], "image", None, target_image_column="target_image")
    assert len(rows[1]["images"]) == len(rows[1]["target_images"]) == 1


def test_both_datasets_are_trained_on(example, tokenizer_path, tmp_path):
    """Rows without codes beside rows with them, and what they are for."""
    options = [f"--{name}={value}" for name, value in draw_options(tokenizer_path, num_rows=12).items()]
    example.main([*options, f"--output_dir={tmp_path}"])
    rows = TrainingDataset(datasets.load_from_disk(str(tmp_path)), "images")
    kinds = [("codes" in row, "messages" in row) for row in (rows[index] for index in range(len(rows)))]
    assert set(kinds) == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drawn_by": "noto"}, "go together"),
        ({"visual_tokenizer": "x"}, "go together"),
        ({"stage": 3}, "name the artist, --drawn_by.*train_pixel_decoder.py takes"),
        ({"stage": 1}, "name the artist, --drawn_by.*train_tokenizer.py takes"),
        ({"stage": 1, "drawn_by": "noto", "visual_tokenizer": "x"}, "leave out --visual_tokenizer"),
    ],
)
def test_options_that_do_not_go_together(example, options, message):
    with pytest.raises(SystemExit, match=message):
        example.check(example.Arguments("unused", **options))


def test_scenes_have_no_artists(example, tokenizer_path):
    args = example.Arguments("unused", **draw_options(tokenizer_path, world="scenes"))
    with pytest.raises(ValueError, match="No artist drew the world of scenes, not 'noto' either"):
        example.make_row(args, 0)
