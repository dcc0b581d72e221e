"""Dropped patches in grey."""

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_hf.utils.patch_pictures import grey_out_dropped, patch_grid


def test_a_grid_has_the_shape_of_its_images() -> None:
    assert patch_grid(256, (224, 224)) == (16, 16)
    assert patch_grid(32, (224, 448)) == (4, 8) and patch_grid(32, (448, 224)) == (8, 4)


@pytest.mark.parametrize("size", [(56, 56), (300, 218), (9, 5), (1, 1)])
def test_only_dropped_patches_are_greyed(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    result = np.asarray(grey_out_dropped(image, mask.flatten(), (2, 4)))
    assert result.shape == (size[1], size[0], 3)
    if min(size) > 8:
        centers = [
            [result[int((row + 0.5) * size[1] / 2), int((column + 0.5) * size[0] / 4)] for column in range(4)]
            for row in range(2)
        ]
        assert np.array_equal((np.array(centers) == (255, 0, 0)).all(-1), mask.numpy())
    assert np.asarray(image).min() == 0  # the given picture is not drawn on


def test_nothing_dropped_changes_nothing(images: list[Image.Image]) -> None:
    image = images[0].convert("RGB")
    assert grey_out_dropped(image, torch.ones(16, dtype=torch.bool), (4, 4)).tobytes() == image.tobytes()
