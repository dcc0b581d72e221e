import base64
import io
import logging

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from lavit_hf.training.dataset import TrainingDataset


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
        ({"on_bad_sample": "ignore"}, ValueError, "'skip', 'raise'"),
        ({"text_column": "caption"}, ValueError, r"no column 'caption' for `text_column`; it has \['image', 'text'\]"),
        ({"image_column": "img", "text_column": None}, ValueError, "no column 'img' for `image_column`"),
        ({"lengths": [1]}, ValueError, "Got 1 lengths for 4 rows"),
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
