"""Datasets as `load_dataset` gives them, with no more than a collator of ours around them."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lavit_hf import LavitImageProcessorPil
from lavit_hf.training import (
    PixelDecoderArguments,
    PixelDecoderDataCollator,
    TrainingDataset,
    VisualTokenizerDataCollator,
    train_pixel_decoder,
)
from lavit_hf.training.dataset import complete_row, number_row
from lavit_hf.training.pixel_decoder.data import ImageDataCollator
from tiny_pixel_decoders import build_pipeline, rows
from training import tiny_tokenizer_training
from training.tiny_training import build_trainer, losses


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
    pipeline = build_pipeline()
    plain = rows(4)
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

    train_pixel_decoder(pipeline, args, plain, collate, validation_rows=plain[:2])
    assert len(seeds) >= 8 and len(set(seeds)) >= 8


def test_collators_of_pictures_take_plain_rows():
    row = {"image": pictures(1)[0]}
    processor = LavitImageProcessorPil(size={"height": 16, "width": 16})
    for collator in (
        VisualTokenizerDataCollator(processor),
        ImageDataCollator(16, 16, 8),
        PixelDecoderDataCollator(build_pipeline(), image_processor=processor),
    ):
        batch = collator([row, {"images": [row["image"]], "text": "a", "sample_id": 3, "epoch": 0}])
        assert len(batch["pixel_values"]) == 2 and len(set(batch["sample_seeds"].tolist())) == 2
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
