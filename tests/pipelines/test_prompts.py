"""What a prompt may look like, and the original's preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_hf.pipelines.pipeline_lavit_text_to_image import original_pixel_values, split_prompts

PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("prompt", "texts", "counts"),
    [
        ("a cat", ["a cat"], [0]),
        ("", [""], [0]),
        (["a", "b"], ["a", "b"], [0, 0]),
        ([PICTURE, "a"], ["<image>a"], [1]),
        (["in ", PICTURE, " style of ", PICTURE], ["in <image> style of <image>"], [2]),
        (PICTURE, ["<image>"], [1]),
        ([[PICTURE, "a"], "b", ["c"]], ["<image>a", "b", "c"], [1, 0, 0]),
        ([np.zeros((4, 4, 3)), "a"], ["<image>a"], [1]),
    ],
)
def test_prompts(prompt, texts, counts) -> None:
    found, images = split_prompts(prompt, "<image>")
    assert found == texts
    assert [len(one) for one in images] == counts


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (None, TypeError, "NoneType"),
        (3, TypeError, "int"),
        ([], ValueError, "at least one prompt"),
        ([[]], TypeError, r"`prompt\[0\]` .* an empty list"),
        (["a", 3], TypeError, r"`prompt\[1\]` .* int"),
        ([[PICTURE, None]], TypeError, "NoneType"),
        ([PICTURE, "an <image>"], ValueError, "'<image>', which stands for an image"),
    ],
)
def test_bad_prompts(prompt, error, match) -> None:
    with pytest.raises(error, match=match):
        split_prompts(prompt, "<image>")


def test_release_preprocessing_is_the_recorded_one(processor, golden) -> None:
    pixel_values = original_pixel_values(golden["detok_input"], processor.image_processor)
    torch.testing.assert_close(pixel_values, golden["detok_pixel_values"], atol=1e-5, rtol=0)


def test_release_preprocessing_takes_pictures_of_several_kinds(processor) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = original_pixel_values(Image.fromarray(array), processor.image_processor)
    for other in (array, torch.from_numpy(array), (array / 255).astype(np.float32)):
        torch.testing.assert_close(original_pixel_values([other], processor.image_processor), expected)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        original_pixel_values(array.astype(np.float32), processor.image_processor)
