"""Karpathy's splits of Flickr30k and COCO."""

import pytest

from lavit_hf.evaluation.data.karpathy import is_karpathy, read_karpathy


def image(number: int, split: str, **values) -> dict:
    sentences = [{"raw": f"Picture {number}.", "tokens": ["picture"]}, {"raw": "It is red.", "tokens": ["it"]}]
    return {"imgid": number, "filename": f"{number}.jpg", "split": split, "sentences": sentences, **values}


def test_a_split(folder, add_image):
    content = {"dataset": "flickr30k", "images": [image(0, "train"), image(1, "test"), image(2, "test")]}
    assert is_karpathy(content)
    add_image("1.jpg")
    add_image("2.jpg")
    samples = read_karpathy(content, folder, "test")
    assert [sample.id for sample in samples] == ["000000000001", "000000000002"]
    assert samples[1].references == ("Picture 2.", "It is red.")
    assert len(read_karpathy(content, folder, "test", 1)) == 1
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        read_karpathy(content, folder, "val")


def test_images_of_coco_are_in_folders_of_their_own(folder, add_image):
    add_image("val2014/5.jpg", "blue")
    (sample,) = read_karpathy({"images": [image(5, "test", filepath="val2014")]}, folder, "test")
    assert sample.open_image().getpixel((0, 0)) == (0, 0, 255)


def test_other_files_are_none_of_these():
    assert not any(map(is_karpathy, ([], {}, None, {"images": [{"id": 1}]})))
