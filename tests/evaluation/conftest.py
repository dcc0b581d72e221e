"""The checkpoint in the repository, loaded once, and pictures for tiny benchmarks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils import logging

from evaluation.tiny_evaluation import load_checkpoint
from lavit_hf.evaluation import EvaluatedCheckpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def random_checkpoint() -> Path:
    return ROOT / "checkpoints" / "lavit-tiny-random"


@pytest.fixture(scope="session")
def evaluated(random_checkpoint: Path) -> Iterator[EvaluatedCheckpoint]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield load_checkpoint(random_checkpoint)
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for images."""
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def add_image(folder: Path):
    """Puts a picture of one color, by which it can be recognized, into the folder."""

    def add(name: str, color: str = "red") -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 16), color).save(folder / name, format="PNG")

    return add
