"""Rows as training reads them."""

import base64
import io
import json
import logging

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

import tiny_pixel_decoders
from lavit_hf import ImageTextProcessor, LavitImageProcessorPil
from lavit_hf.training import (
    PixelDecoderArguments,
    PixelDecoderDataCollator,
    VisualTokenizerDataCollator,
    train_pixel_decoder,
)
from lavit_hf.training.dataset import TrainingDataset, complete_row, number_row
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from lavit_hf.training.pixel_decoder.data import ImageDataCollator
from tiny_parts import CHECKPOINT
from training import tiny_tokenizer_training
from training.tiny_training import build_trainer, losses


def picture(color="red", size=(8, 6)) -> Image.Image:
    return Image.new("RGB", size, color)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def rows(count: int = 4) -> list[dict]:
    return [{"image": picture(), "text": f"caption {index}"} for index in range(count)]


def arrow(images: list[bytes], texts: list[str | None]) -> datasets.Dataset:
    """As loaded from files: images are bytes that nobody has looked at."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    values = {"image": [{"bytes": content, "path": None} for content in images], "text": texts}
    return datasets.Dataset.from_dict(values, features=features)


def test_samples_have_the_promised_fields():
    dataset = TrainingDataset(rows())
    assert len(dataset) == 4
    sample = dataset[2]
    assert list(sample) == ["images", "text", "sample_id", "epoch"]
    assert (sample["text"], sample["sample_id"], sample["epoch"]) == ("caption 2", 2, 0)
    assert [image.mode for image in sample["images"]] == ["RGB"]
    assert dataset[-1]["sample_id"] == 3
    with pytest.raises(IndexError, match="out of range"):
        dataset[4]


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        encoded(picture()),
        {"bytes": encoded(picture()), "path": None},
        np.asarray(picture()),
        torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1),
        picture().convert("P"),
    ],
    ids=["PIL", "bytes", "undecoded", "array", "tensor", "palette"],
)
def test_images_may_come_in_any_form(image):
    (result,) = TrainingDataset([{"image": image, "text": "a"}])[0]["images"]
    assert result.size == (8, 6) and result.getpixel((0, 0)) == (255, 0, 0)


def test_rows_with_several_images_or_none():
    dataset = TrainingDataset([{"image": [picture(), picture("blue")], "text": "a"}, {"image": None, "text": "b"}])
    assert len(dataset[0]["images"]) == 2
    assert dataset[1] == {"images": [], "text": "b", "sample_id": 1, "epoch": 0}


def test_columns_of_images_and_text_can_be_named():
    dataset = datasets.Dataset.from_list([{"file": [picture()], "caption": "a", "huge": b"x"}])
    wrapped = TrainingDataset(dataset, image_column="file", text_column="caption")
    assert wrapped[0]["text"] == "a" and wrapped[0]["images"][0].size == (8, 6)
    assert "huge" not in wrapped.dataset.column_names


def test_without_text_column():
    dataset = TrainingDataset([{"image": picture()}, {"image": None}], text_column=None)
    assert dataset[0]["text"] is None
    assert dataset[1]["sample_id"] == 0, "an image is all there is to a sample here"


@pytest.mark.parametrize("target", [None, [], b"no image", [picture(), picture()]])
def test_an_image_without_its_target_is_bad(target):
    table = [{"image": picture(), "target": target}, {"image": picture("blue"), "target": picture()}]
    dataset = TrainingDataset(table, text_column=None, target_image_column="target")
    assert dataset[0]["sample_id"] == 1 and dataset.bad_samples == [0]
    assert dataset[0]["target_images"][0].getpixel((0, 0)) == (255, 0, 0)


def test_tokenized_rows_keep_their_id_and_length():
    table = {"codes": [[[1, 2], [3]], [[4]]], "text": ["a", "b"], "length": [9, 5], "sample_id": [70, 71]}
    dataset = TrainingDataset(datasets.Dataset.from_dict(table))
    sample = dataset[0]
    assert (sample["codes"], sample["sample_id"]) == ([[1, 2], [3]], 70)
    assert "images" not in sample
    assert [len(row["input_ids"]) for row in dataset] == [9, 5]


def test_relative_paths_start_at_the_root(tmp_path):
    picture().save(tmp_path / "a.png")
    message = {"role": "assistant", "content": [{"type": "text", "text": "red"}, {"type": "image", "path": "a.png"}]}
    values = [{"image": "a.png", "text": "red"}, {"messages": [message]}]
    dataset = TrainingDataset(values, image_root=tmp_path, on_bad_sample="raise")
    assert dataset[0]["images"][0].size == dataset[1]["messages"][0]["content"][1]["image"].size == (8, 6)
    with pytest.raises(ValueError, match="a.png"):
        TrainingDataset(values, on_bad_sample="raise")[0]


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png", "not there/../../secret.png"])
def test_images_out_of_the_root_are_not_read(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    picture().save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    name = name.format(root=tmp_path)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "path": name}]}
    for row in (
        {"image": name},
        {"image": ["a.png", name]},
        {"image": {"bytes": None, "path": name}},
        {"messages": [answer]},
    ):
        picture().save(root / "a.png")
        dataset = TrainingDataset([{"text": "a", **row}], image_root=root, on_bad_sample="raise")
        with pytest.raises(
            ValueError, match="Sample 0 of the dataset is bad: .*(secret|link).png, which .* outside of"
        ):
            dataset[0]


def test_a_long_name_without_an_ending_is_no_way_out_of_the_root(tmp_path):
    root, name = tmp_path / "root", "s" * 100
    root.mkdir()
    picture().save(tmp_path / name, format="PNG")
    with pytest.raises(ValueError, match="bad"):
        TrainingDataset([{"image": str(tmp_path / name), "text": "a"}], image_root=root, on_bad_sample="raise")[0]
    picture().save(root / name, format="PNG")
    assert TrainingDataset([{"image": name, "text": "a"}], image_root=root)[0]["images"][0].size == (8, 6)


def test_base64_needs_no_root(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, format="JPEG")
    text = base64.b64encode(file.getvalue()).decode()
    assert text.startswith("/9j/")  # like an absolute path
    assert TrainingDataset([{"image": text, "text": "a"}], image_root=tmp_path)[0]["images"][0].size == (8, 6)


def test_images_of_unpacked_archives_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "root").mkdir()
    for name in ("a.png", "a" * 64):  # a download is called by its digest
        picture().save(tmp_path / "cache" / name, format="PNG")
        row = {"image": {"bytes": None, "path": str(tmp_path / "cache" / name)}, "text": "a"}
        assert TrainingDataset([row], image_root=tmp_path / "root")[0]["images"][0].size == (8, 6)


def test_prompts_and_messages_are_handed_on():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    dataset = TrainingDataset([{"image": None, "text": "red", "prompt": "Which color?"}, {"messages": chat}])
    assert dataset[0]["prompt"] == "Which color?"
    assert dataset[1]["messages"] == chat


def test_images_of_a_chat_of_texts_come_before_the_first_question():
    """As in TRL, whose datasets have images beside chats of plain texts."""
    chat = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "which is larger?"},
        {"role": "assistant", "content": "the first"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "it is near"},
    ]
    messages = TrainingDataset([{"image": [picture(), picture()], "messages": chat}])[0]["messages"]
    question = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which is larger?"}]
    assert messages == [chat[0], {"role": "user", "content": question}, *chat[2:]]
    assert chat[1]["content"] == "which is larger?"


def test_lengths_are_known_without_decoding():
    dataset = TrainingDataset(arrow([b"not an image", encoded(picture())], ["a", "b"]), lengths=[5, 7])
    assert [len(row["input_ids"]) for row in dataset] == [5, 7]
    assert dataset.bad_samples == []
    first, second = dataset
    assert first["text"] == "b" and dataset.bad_samples == [0], "any other field is read on demand"
    assert dict(second) == dataset[1]


# Bad samples


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_corrupt_image_is_counted_logged_and_replaced(damage, caplog, monkeypatch):
    good = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    bad = {"garbage": b"not an image", "truncated": good[: len(good) // 2], "empty": b""}[damage]
    dataset = TrainingDataset(arrow([good, bad, bad, good], ["a", "b", "c", "d"]))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING")
    assert [dataset[index]["sample_id"] for index in range(4)] == [0, 3, 3, 3]
    assert [dataset[index]["text"] for index in range(4)] == ["a", "d", "d", "d"]
    assert dataset.bad_samples == [1, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "each is reported once, however often it is met"
    assert "Sample 1 of the dataset is bad" in messages[0]


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_a_missing_caption_is_bad(text):
    dataset = TrainingDataset([{"image": picture(), "text": text}, *rows(2)])
    assert dataset[0]["text"] == "caption 0"
    assert dataset.bad_samples == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a <image> tag"}, r"0 image\(s\), but its text has 1 <image>"),
        ({"text": "a", "prompt": "<image><image>", "image": [picture()]}, r"1 image\(s\), but its text has 2"),
        ({"image": 5, "text": "a"}, "the image is of type int"),
        ({"text": "a", "sample_id": "first"}, "sample_id 'first' is no integer"),
        ({"text": "a", "sample_id": 3.7}, "sample_id 3.7 is no integer"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"messages have 1 part\(s\)"),
        ({"messages": [{"role": "assistant", "content": "a"}], "image": picture()}, r"messages have 0 part\(s\)"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "messages of the assistant are empty"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "assistant are empty"),
        ({"messages": [{"content": "hi"}, {"role": "assistant", "content": "a"}]}, "lacks a role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "or a content"),
        ({"messages": [{"role": "assistant", "content": [{"text": "a"}]}]}, "parts with a type"),
        ({"text": ["a", "b"]}, "the text is of type list"),
        ({"text": "a", "prompt": 3}, "the prompt is of type int"),
    ],
)
def test_text_and_images_that_do_not_fit_are_bad(fields, message):
    row = {"image": None, "text": None, "prompt": None, "messages": None, **fields}
    with pytest.raises(ValueError, match=message):
        TrainingDataset([row], on_bad_sample="raise")[0]


def test_images_in_messages_count_themselves():
    image = {"type": "image", "image": picture(), "path": None}
    chat = [{"role": "assistant", "content": [image, {"type": "image", "image": None}]}]
    assert len(TrainingDataset([{"image": picture(), "messages": chat}], on_bad_sample="raise")[0]["images"]) == 1


@pytest.mark.parametrize(
    "source", [{"image": encoded(picture())[:40]}, {"image": {"bytes": b"no", "path": None}}, {"path": "missing.png"}]
)
def test_a_corrupt_image_in_messages_is_replaced(source):
    """Regression: these were decoded by the collator only, where a whole run ended with them."""

    def chat(source: dict) -> list[dict]:
        question = [{"type": "image", "path": None, **source}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]

    dataset = TrainingDataset([{"messages": chat(source)}, {"messages": chat({"image": encoded(picture())})}])
    sample = dataset[0]
    assert sample["sample_id"] == 1 and dataset.bad_samples == [0]
    assert sample["messages"][0]["content"][0]["image"].size == (8, 6)


def test_an_empty_sample_id_is_the_index():
    assert TrainingDataset([{"image": picture(), "text": "a", "sample_id": None}])[0]["sample_id"] == 0


def test_the_last_sample_is_replaced_by_the_first():
    dataset = TrainingDataset([*rows(2), {"image": picture(), "text": ""}])
    assert dataset[2]["sample_id"] == 0


def test_bad_samples_can_be_raised():
    dataset = TrainingDataset(arrow([encoded(picture()), b"no"], ["a", "b"]), on_bad_sample="raise")
    assert dataset[0]["text"] == "a"
    with pytest.raises(ValueError, match=r"Sample 1 of the dataset is bad: .*bytes as an image"):
        dataset[1]


def test_nothing_but_bad_samples():
    with pytest.raises(ValueError, match="All 2 samples of the dataset are bad"):
        TrainingDataset([{"image": None, "text": ""}] * 2)[0]


def test_float_arrays_are_no_images():
    dataset = TrainingDataset([{"image": np.zeros((4, 4, 3)), "text": "a"}], on_bad_sample="raise")
    with pytest.raises(ValueError, match="uint8"):
        dataset[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": iter([])}, TypeError, "needs a dataset with a length, got list_iterator"),
        ({"dataset": []}, ValueError, "is empty"),
        ({"on_bad_sample": "ignore"}, ValueError, "'skip' or 'raise'"),
        ({"text_column": "caption"}, ValueError, r"no column 'caption' for `text_column`; it has \['image', 'text'\]"),
        ({"image_column": "img", "text_column": None}, ValueError, "no column 'img' for `image_column`"),
        ({"lengths": [1]}, ValueError, "Got 1 lengths for 4 rows"),
        ({"target_image_column": "x"}, ValueError, "no column 'x' for `target_image_column`"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingDataset(**{"dataset": rows(), **arguments})


def test_a_user_s_transform_is_left_alone():
    dataset = arrow([encoded(picture())], ["a"]).with_transform(
        lambda batch: {"image": batch["image"], "text": [text.upper() for text in batch["text"]]}
    )
    assert TrainingDataset(dataset)[0]["text"] == "A"


# Epochs


def test_samples_carry_the_epoch():
    dataset = TrainingDataset(rows())
    dataset.set_epoch(3)
    assert dataset[0]["epoch"] == dataset.epoch == 3


def test_worker_processes_see_the_epoch_and_report_bad_samples():
    dataset = TrainingDataset([*rows(3), {"image": picture(), "text": ""}])
    loader = DataLoader(dataset, num_workers=2, persistent_workers=True, collate_fn=list)
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        assert [sample["epoch"] for (sample,) in loader] == [epoch] * 4
    assert dataset.bad_samples == [3]
    del loader


@pytest.mark.parametrize("processes", [1, 2])
def test_which_parts_accelerate_tells_the_epoch(processes):
    """Says what EpochCallback is there for; once this fails, accelerate has improved and it may go."""

    def build():
        dataset = TrainingDataset(rows(8))
        loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=list)
        return dataset, prepare_data_loader(
            loader, num_processes=processes, process_index=0, use_seedable_sampler=True, data_seed=0
        )

    dataset, loader = build()
    loader.set_epoch(2)
    assert dataset.epoch == (2 if processes == 1 else 0)
    dataset, loader = build()
    resumed = skip_first_batches(loader, 1)
    resumed.set_epoch(2)
    assert dataset.epoch == 0
    sampler = loader.batch_sampler.sampler if processes == 1 else loader.batch_sampler.batch_sampler.sampler
    assert sampler.epoch == 2, "the order of samples is right in any case"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "half \ud83d"},
        {"text": "a", "prompt": "\ud83d"},
        {"text": None, "messages": [None]},
        {"text": None, "messages": 5},
        {"text": "a", "messages": 0},
        {"text": None, "messages": [{"role": "assistant", "content": [None]}]},
        {"text": None, "messages": [{"role": "assistant", "content": [{"type": "text", "text": 5}]}]},
        {"text": None, "messages": [{"role": "assistant", "content": "\udcff"}]},
        {"text": "a", "codes": [None]},
        {"text": "a", "codes": 5},
        {"text": "a", "codes": [["x"]]},
    ],
)
def test_nulls_integers_and_half_characters_are_bad_samples(row):
    with pytest.raises(ValueError, match="Sample 0 of the dataset is bad"):
        TrainingDataset([row], on_bad_sample="raise")[0]


def test_no_messages_beside_text_are_no_chat():
    """Columns of chats have empty lists, or nothing, where a row has text alone."""
    rows = [{"text": "a", "messages": messages} for messages in ([], (), None)]
    expected = [{"images": [], "text": "a", "sample_id": index, "epoch": 0} for index in range(3)]
    assert [TrainingDataset(rows, on_bad_sample="raise")[index] for index in range(3)] == expected


# The number of tokens of every row, for batches of rows of equal length.


@pytest.fixture(scope="module")
def processor() -> ImageTextProcessor:
    return ImageTextProcessor.from_pretrained(CHECKPOINT)


ROWS = [
    {"image": picture(), "text": "a cat"},
    {"image": None, "text": "a cat sat on a dog"},
    {"image": picture(), "text": "red", "prompt": "Question: x? Answer:"},
]


def lengths(dataset: TrainingDataset) -> list[int]:
    return [len(row["input_ids"]) for row in dataset]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_lengths_are_those_of_the_collator(processor, kind):
    dataset = TrainingDataset(kind(ROWS)).measure_lengths(processor)
    collator = LavitDataCollator(processor, image_first_probability=1)
    assert lengths(dataset) == [collator([dataset[index]])["input_ids"].shape[1] for index in range(3)]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_with_several_images(processor, kind):
    rows = [{"image": [picture()] * 3, "text": "a"}, {"image": [], "text": "a"}]
    many, none = lengths(TrainingDataset(kind(rows)).measure_lengths(processor))
    assert many - none == 3 * (16 + 2)


def test_chats(processor):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a b c"}]},
        {"role": "assistant", "content": "d"},
    ]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "d"}]
    first, second = lengths(TrainingDataset([{"messages": messages}, {"messages": short}]).measure_lengths(processor))
    assert first > second > 0


def test_bad_rows_have_no_text(processor):
    """They are left out when they are read; until then, nothing stops at them."""
    bad = [{"text": "half \ud83d"}, {"text": 5}, {"text": "a", "prompt": 5}, {"messages": 5}, {"messages": [None]}]
    dataset = TrainingDataset([*ROWS, *bad]).measure_lengths(processor)
    assert lengths(dataset) == [*lengths(TrainingDataset(ROWS).measure_lengths(processor)), *[1] * len(bad)]


def test_no_image_is_decoded(processor):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    corrupt = datasets.Dataset.from_dict({"image": [{"bytes": b"no", "path": None}], "text": ["a"]}, features=features)
    assert lengths(TrainingDataset(corrupt).measure_lengths(processor)) == [1 + 1 + 18]


# Datasets as `load_dataset` gives them, with no more than a collator of ours around them.


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((56, 56)) for array in pixels]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> datasets.Dataset:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for index, picture in enumerate(pictures(8)):
        picture.save(root / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"cat {index}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return datasets.load_dataset("imagefolder", data_dir=str(root), split="train")


def test_a_folder_of_pictures_trains_the_language_model(folder, tmp_path):
    trainer = build_trainer(tmp_path / "out", num_train_epochs=4)
    trainer.train_dataset = trainer.eval_dataset = folder
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.data_collator.epoch == 3
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_resumed_run_of_a_plain_dataset_equals_an_uninterrupted_one(folder, tmp_path):
    found = []
    for steps in ({"save_strategy": "steps", "save_steps": 3}, {}):
        trainer = build_trainer(tmp_path / "out", num_train_epochs=3, **steps)
        trainer.train_dataset = folder
        trainer.train(resume_from_checkpoint=None if steps else str(tmp_path / "out" / "checkpoint-3"))
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_a_folder_of_pictures_trains_the_visual_tokenizer(folder, tmp_path):
    trainer = tiny_tokenizer_training.build_trainer(tmp_path / "out", max_steps=3)
    trainer.train_dataset = trainer.eval_dataset = folder
    trainer.train()
    assert len(tiny_tokenizer_training.train_logs(trainer)) == 3 and trainer.data_collator.epoch == 2
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_plain_dataset_trains_the_pixel_decoder_with_new_noise_in_every_epoch(tmp_path):
    pipeline = tiny_pixel_decoders.build_pipeline()
    plain = tiny_pixel_decoders.rows(4)
    args = PixelDecoderArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        use_ema=False,
        use_cpu=True,
    )
    collator, seeds = PixelDecoderDataCollator(pipeline), []

    def collate(samples):
        seeds.extend(collator(samples)["sample_seeds"].tolist())
        return collator(samples)

    trainer = train_pixel_decoder(pipeline, args, plain, collate, validation_rows=plain[:2])
    assert len(seeds) >= 8 and len(set(seeds)) >= 8
    seeds.clear()
    for epoch in range(2):  # what is validated with has the same noise in each
        collator.set_epoch(epoch)
        list(trainer.eval_batches(plain[:2]))
    assert seeds[:2] == seeds[2:]


def test_collators_of_pictures_take_plain_rows():
    row = {"image": pictures(1)[0]}
    processor = LavitImageProcessorPil(size={"height": 16, "width": 16})
    for collator in (
        VisualTokenizerDataCollator(processor),
        ImageDataCollator(16, 16, 8),
        PixelDecoderDataCollator(tiny_pixel_decoders.build_pipeline(), image_processor=processor),
    ):
        batch = collator([row, {"images": [row["image"]], "text": "a", "sample_id": 3, "epoch": 0}])
        assert len(batch["pixel_values"]) == 2 and len(set(batch["sample_seeds"].tolist())) == 2
        collator.set_epoch(1)  # as EpochCallback does: another epoch, other noise
        later = collator([row, {"images": [row["image"]], "text": "a", "sample_id": 3, "epoch": 0}])
        assert (later["sample_seeds"] == batch["sample_seeds"]).tolist() == [False, True]
        with pytest.raises(ValueError, match=r"nothing but \['label'\].*remove_unused_columns=False"):
            collator([{"label": 0}])
        for image in (5, "data:,x", b"no image"):
            with pytest.raises(ValueError, match="Sample 7 is bad: .*image.*. TrainingDataset skips"):
                collator([{"image": image, "sample_id": 7}])


def test_a_number_is_that_of_the_content():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    assert number_row({"image": red, "text": "a"}) == number_row({"text": "a", "image": red.copy(), "other": 5})
    message = {"role": "user", "content": [{"type": "image", "image": red}]}
    contents = [
        {"image": red, "text": "a"},
        {"image": blue, "text": "a"},
        {"image": red, "text": "b"},
        {"image": [red, red], "text": "a"},
        {"image": np.asarray(red), "text": "a"},
        {"image": {"bytes": b"1", "path": None}},
        {"image": {"bytes": b"2", "path": None}},
        {"text": "a", "prompt": "b"},
        {"codes": [[1, 2]], "text": "a"},
        {"codes": [[1], [2]], "text": "a"},
        {"messages": [message]},
        {"messages": [{**message, "content": [{"type": "image", "image": blue}]}]},
    ]
    numbers = [number_row(row) for row in contents]
    assert len(set(numbers)) == len(numbers) and all(0 <= number < 2**63 for number in numbers)


def test_what_a_row_has_stays():
    sample = TrainingDataset([{"image": pictures(1)[0], "text": "a"}])[0]
    assert complete_row(sample, epoch=4) == sample


def test_workers_learn_the_epoch():
    collator = VisualTokenizerDataCollator(LavitImageProcessorPil(size={"height": 16, "width": 16}))
    loader = DataLoader([{"image": pictures(1)[0]}], num_workers=1, persistent_workers=True, collate_fn=collator)
    seeds = []
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        seeds += [batch["sample_seeds"] for batch in loader]
    assert torch.equal(seeds[0], seeds[2]) and not torch.equal(seeds[0], seeds[1])
    del loader


@pytest.mark.parametrize("column", ["caption", "completion"])
def test_text_under_another_name_is_named(column):
    row = {"image": pictures(1)[0], column: "a cat"}
    with pytest.raises(ValueError, match=f"no column 'text' or 'messages'.*has {column}, image.*rename_column"):
        complete_row(row, needs_text=True)


def test_columns_and_lengths_are_those_of_the_users_transform(processor) -> None:
    raw = datasets.Dataset.from_list([{"caption": "a red square", "n": index} for index in range(3)])

    def transform(batch):
        return {"image": [picture()] * len(batch["n"]), "text": [text * 2 for text in batch["caption"]]}

    found = lengths(TrainingDataset(raw.with_transform(transform)).measure_lengths(processor))
    plain = TrainingDataset([{"image": picture(), "text": "a red square" * 2}] * 3).measure_lengths(processor)
    assert found == lengths(plain)
