"""Regions: which patches they cover, whatever the image's shape, and what of it reaches the model."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers.image_utils import SizeDict

from lavit_hf import ImageTextProcessor
from lavit_hf.processing.image_budgets import region_log_prior

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "lavit-tiny-random"
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"
GRID = (4, 4)


@pytest.fixture(scope="module")
def processor() -> ImageTextProcessor:
    return ImageTextProcessor.from_pretrained(CHECKPOINT)


def test_boxes():
    """The image is squashed, so a quarter of it is a quarter of the patches."""
    prior = region_log_prior((100, 0, 200, 25), (50, 200), GRID, 10.0).reshape(GRID)
    expected = torch.zeros(GRID)
    expected[:2, 2:] = math.log(10)
    torch.testing.assert_close(prior, expected)
    half = region_log_prior((0, 0, 25, 50), (50, 200), GRID, 10.0).reshape(GRID)  # half of the first column
    torch.testing.assert_close(half[:, 0], torch.full((4,), math.log(10) / 2))
    assert not half[:, 1:].any()


@settings(max_examples=100)
@given(st.data())
def test_boxes_and_masks_agree(data):
    """A mask of the box's pixels covers what the box does, and two boxes what either does."""
    left, top = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 14))
    right, bottom = data.draw(st.integers(left + 1, 32)), data.draw(st.integers(top + 1, 16))
    mask = np.zeros((16, 32), dtype=bool)
    mask[top:bottom, left:right] = True
    box = (left, top, right, bottom)
    by_box, by_mask = (region_log_prior(region, (16, 32), GRID, 5.0) for region in (box, mask))
    torch.testing.assert_close(by_box, by_mask)
    torch.testing.assert_close(region_log_prior([box, box], (16, 32), GRID, 5.0), by_box)
    lowered = region_log_prior(box, (16, 32), GRID, 1 / 5.0)
    torch.testing.assert_close(lowered, -by_box)


def test_no_region():
    assert not region_log_prior(None, (16, 32), GRID, 5.0).any()
    assert not region_log_prior((0, 0, 1, 1), (16, 32), GRID, 1.0).any()


@pytest.mark.parametrize(
    ("region", "weight", "message"),
    [
        ((0, 0, 33, 8), 2.0, "not in the image, which is 32 pixels wide and 16 high"),
        ((8, 0, 8, 8), 2.0, "not in the image"),
        ((-1, 0, 8, 8), 2.0, "not in the image"),
        ((0, 0, math.nan, 8), 2.0, "not in the image"),
        ((0, 0, 8), 2.0, "must be a box"),
        ("left", 2.0, "must be a box"),
        (np.zeros((16, 31), dtype=bool), 2.0, "mask of the image's size, 16 x 32"),
        (np.full((16, 32), 2.0), 2.0, "from 0 to 1"),
        ((0, 0, 8, 8), 0.0, "positive number; got 0.0"),
        ((0, 0, 8, 8), math.inf, "positive number"),
        ((0, 0, 8, 8), "much", "positive number"),
    ],
)
def test_regions_that_cannot_be(region, weight, message):
    with pytest.raises(ValueError, match=message):
        region_log_prior(region, (16, 32), GRID, weight)


def test_the_processor_hands_them_to_the_model(processor):
    photo = Image.open(PHOTO)
    width, height = photo.size
    box = (0, 0, width / 2, height)
    inputs = processor(
        [photo, PHOTO, photo],
        "<image><image><image>",
        regions=[box, box, None],
        num_image_tokens=4,
        return_tensors="pt",
    )
    prior = inputs["image_log_prior"].reshape(3, 4, 4)
    torch.testing.assert_close(prior[0, :, :2], torch.full((4, 2), math.log(10)))
    assert not prior[0, :, 2:].any() and not prior[2].any()
    assert torch.equal(prior[0], prior[1])  # of a file as of an opened image
    alone = processor(photo, "<image>", regions=box, region_weight=3, return_tensors="pt")["image_log_prior"]
    torch.testing.assert_close(alone.max(), torch.tensor(math.log(3)))


def test_sides_of_photographs_are_those_one_sees(processor):
    """A camera's picture may lie on its side in the file."""
    turned = Image.new("RGB", (40, 80))
    turned.getexif()[ExifTags.Base.Orientation] = 6
    mask = np.zeros((40, 80), dtype=bool)
    mask[:, :40] = True
    prior = processor(turned, "<image>", regions=[mask], return_tensors="pt")["image_log_prior"].reshape(4, 4)
    assert (prior[:, :2] > 0).all() and not prior[:, 2:].any()


def test_discrete_images(processor):
    photo = Image.open(PHOTO)
    right = (photo.width / 2, 0, photo.width, photo.height)
    options = {"visual_mode": "discrete", "num_image_tokens": 8, "return_tensors": "pt"}
    ids = processor(photo, "<image>", regions=[right], region_weight=1e9, **options)["input_ids"]
    mask = (torch.arange(16) % 4 >= 2)[None]
    pixel_values = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
    codes = processor.get_visual_tokenizer().encode(pixel_values, keep_mask=mask).codes
    assert torch.equal(ids[0, 1:-1], processor.tokenizer.convert_codes_to_ids(codes))
    budget = {"keep_rate": 0.5, "regions": [right, None], "region_weight": 1e9}
    one, other = processor.tokenize_images([photo, photo], **budget)
    assert torch.equal(one, ids[0]) and len(other) == 10 and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": [None]}, "1 regions for 2 images"),
        ({"regions": [None, None, None]}, "3 regions for 2 images"),
        ({"region_weight": 3}, "pass both"),
    ],
)
def test_calls_that_do_not_fit(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor([Image.new("RGB", (8, 8))] * 2, "<image><image>", **options)


def test_an_image_without_a_region_is_not_opened_for_its_size(monkeypatch) -> None:
    from lavit_hf.processing import image_budgets

    opened = []
    monkeypatch.setattr(image_budgets, "read_size", lambda image: opened.append(image) or (16, 32))
    size = SizeDict(height=GRID[0] * 4, width=GRID[1] * 4)
    prior = image_budgets.assign_log_prior(["a", "b"], [None, (0, 0, 16, 16)], None, size, GRID[0] * GRID[1])
    assert opened == ["b"] and not prior[0].any() and prior[1].any()
