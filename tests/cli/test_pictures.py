"""Pictures of commands: dropped patches in grey, and files that are complete or not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_cli.pictures import grey_out_dropped, save_picture


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


def test_nothing_dropped_changes_nothing(photo: Path) -> None:
    image = Image.open(photo)
    assert grey_out_dropped(image, torch.ones(16, dtype=torch.bool), (4, 4)).tobytes() == image.tobytes()


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, file, **kwargs) -> None:
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("RGB", (20, 10)), tmp_path / "demo.png")
    assert list(tmp_path.iterdir()) == []
