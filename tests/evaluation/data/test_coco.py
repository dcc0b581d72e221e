"""Captions of COCO and NoCaps."""

import pytest

from lavit_hf.evaluation.data.coco import is_coco, read_coco


def content() -> dict:
    return {
        "images": [
            {"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "width": 24, "height": 16},
            {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
            {"id": 7, "file_name": "without_captions.jpg"},
        ],
        "annotations": [
            {"image_id": 391895, "id": 2, "caption": "A man rides."},
            {"image_id": 42, "id": 3, "caption": "A dog."},
            {"image_id": 391895, "id": 1, "caption": "A person on a bike."},
        ],
    }


def test_one_sample_per_image(folder, add_image):
    add_image("COCO_val2014_000000391895.jpg")
    add_image("COCO_val2014_000000000042.jpg", "blue")
    assert is_coco(content())
    samples = read_coco(content(), folder)
    assert [sample.id for sample in samples] == ["000000000042", "000000391895"]
    assert [sample.references for sample in samples] == [("A dog.",), ("A man rides.", "A person on a bike.")]
    assert samples[0].open_image().getpixel((0, 0)) == (0, 0, 255)
    assert samples[0].question is None


def test_the_first_images(folder, add_image):
    add_image("COCO_val2014_000000000042.jpg")
    assert [sample.id for sample in read_coco(content(), folder, 1)] == ["000000000042"]


def test_two_images_of_one_id_are_both_there(folder, add_image):
    """So that whoever reads the file says so."""
    add_image("COCO_val2014_000000000042.jpg")
    twice = content()
    twice["images"].append(twice["images"][1])
    assert [sample.id for sample in read_coco(twice, folder, 2)] == ["000000000042"] * 2


def test_missing_images(folder):
    with pytest.raises(ValueError, match="has no COCO_val2014_000000000042.jpg; --images takes"):
        read_coco(content(), folder)


def test_other_files_are_none_of_these():
    questions = {"questions": [], "images": [{"id": 1}], "annotations": [{"image_id": 1, "answers": []}]}
    assert not any(map(is_coco, ([], {}, None, questions, {"images": [{"sentences": []}]})))
