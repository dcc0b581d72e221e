"""The number of tokens of every row, for batches of rows of equal length."""

import datasets
import pytest
from PIL import Image

from lavit_hf import ImageTextProcessor
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_parts import CHECKPOINT


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
