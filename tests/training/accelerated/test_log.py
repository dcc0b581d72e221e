"""Where the training loop writes what it measures and draws."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lavit_hf.training.accelerated.log import LoopLog


class Tracker:
    """One of accelerate's, as far as the log uses it."""

    def __init__(self, name: str):
        self.name, self.calls = name, []

    def log_images(self, values: dict, step: int, **options) -> None:
        self.calls.append((values, step, options))


class Accelerator(SimpleNamespace):
    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))


@pytest.fixture
def accelerator():
    trackers = [Tracker("tensorboard"), Tracker("wandb"), SimpleNamespace(name="mlflow")]
    return Accelerator(is_main_process=True, trackers=trackers, logged=[])


def test_numbers(tmp_path, accelerator):
    log = LoopLog(tmp_path, accelerator)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 4})
    assert accelerator.logged == [({"loss": step / 4}, step) for step in (1, 2, 3)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 4} for step in (1, 2, 3)]


def test_a_resumed_run_forgets_what_it_will_log_again(tmp_path, accelerator):
    log = LoopLog(tmp_path, accelerator)
    log.rewind(0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.5})
    before = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(before + '{"step": 4, "lo')  # killed while it wrote
    log.rewind(2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:2])


def test_images_go_to_a_file_and_to_the_trackers_that_take_them(tmp_path, accelerator, caplog):
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    path = LoopLog(tmp_path, accelerator).write_image(7, image)
    assert path == tmp_path / "validation" / "step-0000007.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    tensorboard, wandb, _ = accelerator.trackers
    ((values, step, options),) = tensorboard.calls
    assert values["validation"].shape == (1, 2, 4, 3) and (step, options) == (7, {"dataformats": "NHWC"})
    assert wandb.calls == [({"validation": [image]}, 7, {})]
    assert "The tracker mlflow takes no images" in caplog.text


def test_only_the_main_process_writes(tmp_path, accelerator):
    accelerator.is_main_process = False
    log = LoopLog(tmp_path, accelerator)
    log.write(1, {"loss": 0.5})
    log.rewind(0)
    assert accelerator.logged == [] and list(tmp_path.iterdir()) == []
