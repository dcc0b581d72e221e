"""Where pictures of a validation go."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.integrations import TensorBoardCallback, WandbCallback

from training.pixel_decoder.tiny_trainers import build_trainer


class Board(TensorBoardCallback):
    """A callback of transformers, as far as pictures are concerned."""

    def __init__(self) -> None:
        self.tb_writer = self
        self.images: list = []

    def add_image(self, name, image, step, dataformats) -> None:
        self.images.append((name, image, step, dataformats))


class Wandb(WandbCallback):
    def __init__(self) -> None:
        pass


@pytest.fixture
def trainer(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.state.global_step = 7
    return trainer


def test_images_go_to_a_file_and_to_the_trackers_that_take_them(trainer, tmp_path, monkeypatch):
    board, logged = Board(), []
    wandb = SimpleNamespace(run=SimpleNamespace(log=logged.append), Image=lambda image: image)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer.callback_handler.callbacks += [board, Wandb()]
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    trainer.show(image)
    path = tmp_path / "validation" / "step-0000007.png"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    ((name, shown, step, dataformats),) = board.images
    assert (name, shown.shape, step, dataformats) == ("validation", (2, 4, 3), 7, "HWC")
    assert logged == [{"validation": image, "train/global_step": 7}]
