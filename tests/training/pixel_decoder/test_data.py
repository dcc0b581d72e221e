"""Batches of stage 3: picture, codes or the tokenizer's input, sizes and seeds."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lavit_hf import LavitImageProcessorPil
from lavit_hf.training.pixel_decoder.data import PixelDecoderDataCollator, PixelDecoderDataset
from lavit_hf.utils.seeds import sample_seed
from tiny_pixel_decoders import CODEBOOK_SIZE, NUM_QUERIES, build_pipeline, pictures, rows


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline(highres=True)


@pytest.fixture(scope="module")
def image_processor():
    return LavitImageProcessorPil(size={"height": 16, "width": 16})


def sample(image: Image.Image, codes: list | None = None, **values) -> dict:
    row = {"images": [image], "text": None, "sample_id": 7, "epoch": 0, **values}
    return row if codes is None else {**row, "codes": codes}


def striped(width: int = 96, height: int = 32) -> Image.Image:
    """Three squares: red, green, blue."""
    array = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        array[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return Image.fromarray(array)


def test_the_picture_and_the_tokenizer_see_the_same_center(pipeline, image_processor):
    batch = PixelDecoderDataCollator(pipeline, image_processor=image_processor)([sample(striped())])
    assert set(batch) == {"pixel_values", "tokenizer_pixel_values", "time_ids", "sample_ids", "sample_seeds"}
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    green = torch.tensor([-1.0, 1.0, -1.0])
    assert torch.equal(batch["pixel_values"], green[None, :, None, None].expand(1, 3, 16, 16))
    expected = image_processor([Image.new("RGB", (16, 16), (0, 255, 0))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["tokenizer_pixel_values"], expected)


def test_pictures_of_another_shape(pipeline, image_processor):
    collator = PixelDecoderDataCollator(pipeline, height=8, width=16, image_processor=image_processor)
    batch = collator([sample(striped().rotate(90, expand=True))])
    assert batch["pixel_values"].shape == (1, 3, 8, 16)
    assert (batch["pixel_values"].argmax(dim=1) == 1).all() and batch["tokenizer_pixel_values"].shape[-2:] == (16, 16)
    assert batch["time_ids"].tolist() == [[8, 16, 0, 0, 8, 16]]


def test_where_codes_are_given_nothing_is_cut(pipeline):
    batch = PixelDecoderDataCollator(pipeline)([sample(striped(), [[1, 2]]), sample(striped(), [[]]) | {"epoch": 1}])
    assert set(batch) == {"pixel_values", "codes", "num_tokens", "time_ids", "sample_ids", "sample_seeds"}
    assert batch["codes"].tolist() == [1, 2] and batch["num_tokens"].tolist() == [2, 0]
    columns = batch["pixel_values"][0, :, 8].argmax(dim=0)
    assert columns[0] == 0 and columns[8] == 1 and columns[-1] == 2


def test_sizes_that_sdxl_is_told(pipeline, image_processor):
    options = {"height": 16, "width": 16, "image_processor": image_processor}
    as_drawn, as_found = (
        PixelDecoderDataCollator(pipeline, **options, original_sizes=found)([sample(striped())])["time_ids"].tolist()
        for found in (False, True)
    )
    assert as_drawn == [[16, 16, 0, 0, 16, 16]]
    assert as_found == [[32, 96, 0, 16, 16, 16]]  # 32 pixels cut off on the left, halved


def test_seeds_are_those_of_seed_epoch_and_sample(pipeline):
    image = pictures(1)[0]
    batch = PixelDecoderDataCollator(pipeline, seed=5)(
        [sample(image, [[1]]), sample(image, [[1]], epoch=1), sample(image, [[1]], sample_id=8)]
    )
    expected = [sample_seed(5, *key, "pixel_decoder") for key in ((0, 7), (1, 7), (0, 8))]
    assert batch["sample_seeds"].tolist() == expected and len(set(expected)) == 3
    assert batch["sample_ids"].tolist() == [7, 7, 8]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (17, 16)])
def test_images_of_any_size(pipeline, image_processor, size):
    batch = PixelDecoderDataCollator(pipeline, image_processor=image_processor)([sample(Image.new("RGB", size))])
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and (batch["pixel_values"] == -1).all()


@pytest.mark.parametrize("size", [{"height": 15}, {"width": 0}, {"height": -2}, {"width": 16.0}])
def test_sizes_that_do_not_fit(pipeline, size):
    with pytest.raises(ValueError, match="must be a positive multiple of 2"):
        PixelDecoderDataCollator(pipeline, **size)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        ([[1, CODEBOOK_SIZE]], ValueError, "Sample 7 does not fit .* code 24; codes go from 0 to 23"),
        ([[-1]], ValueError, "Sample 7 does not fit .* code -1"),
        ([[0] * (NUM_QUERIES + 1)], ValueError, "Sample 7 does not fit .* has 17 codes; an image has at most 16"),
        ([], ValueError, "Sample 7 has codes of 0 images"),
        ([[1], [2]], ValueError, "Sample 7 has codes of 2 images"),
        ([[0.5]], TypeError, "codes of sample 7.* must hold integers"),
    ],
)
def test_codes_that_do_not_fit(pipeline, codes, error, message):
    with pytest.raises(error, match=message):
        PixelDecoderDataCollator(pipeline)([sample(pictures(1)[0], codes)])


def test_samples_that_do_not_fit(pipeline, image_processor):
    image = pictures(1)[0]
    collator = PixelDecoderDataCollator(pipeline, image_processor=image_processor)
    with pytest.raises(ValueError, match="Sample 7 has 2 images; training needs exactly one"):
        collator([sample(image, images=[image, image])])
    with pytest.raises(ValueError, match="some have none; give codes for all or for none"):
        collator([sample(image), sample(image, [[1]])])
    with pytest.raises(ValueError, match="The rows have no codes: pass an `image_processor`"):
        PixelDecoderDataCollator(pipeline)([sample(image)])


def test_a_dataset_keeps_images_beside_codes(pipeline):
    """Such as `tokenize_dataset(..., keep_columns=["image"])` writes."""
    extra = {"text": "a picture", "length": 9}
    source = [{**row, **extra, "sample_id": 10 + index} for index, row in enumerate(rows(3))]
    number = datasets.Value("int32")
    features = {"image": datasets.Image(), "codes": [[number]], "text": datasets.Value("string"), "length": number}
    features = datasets.Features({**features, "sample_id": number})
    columns = {name: [row[name] for row in source] for name in features}
    for rows_of in (source, datasets.Dataset.from_dict(columns, features=features)):
        dataset = PixelDecoderDataset(rows_of)
        dataset.set_epoch(2)
        for index, row in enumerate(source):
            found = dataset[index]
            assert found["codes"] == row["codes"] and found["sample_id"] == 10 + index and found["epoch"] == 2
            assert np.array_equal(np.asarray(found["images"][0]), np.asarray(row["image"]))
        batch = PixelDecoderDataCollator(pipeline)([dataset[index] for index in range(3)])
        assert batch["num_tokens"].tolist() == [len(row["codes"][0]) for row in source]


def test_a_dataset_without_codes_or_with_bad_images():
    source = [{"image": picture} for picture in pictures(2)] + [{"image": b"no image"}]
    dataset = PixelDecoderDataset(source)
    assert "codes" not in dataset[0] and dataset[2]["sample_id"] == 0 and dataset.bad_samples == [2]
    coded = PixelDecoderDataset([{**row, "codes": [[index]]} for index, row in enumerate(source)])
    assert coded[2]["codes"] == [[0]] and coded[2]["sample_id"] == 0
    with pytest.raises(ValueError, match="Sample 2 of the dataset is bad"):
        PixelDecoderDataset(source, on_bad_sample="raise")[2]
