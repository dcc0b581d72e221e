"""`lavit plot`: the curves of trainings, whichever stage and whoever wrote them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavit_cli.plot import _name


def save_log(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": rows[-1]["step"], "log_history": rows}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 0.1, "epoch": 0.5} for step in range(1, 6)]
    rows += [{"step": 5, "eval_loss": 0.4, "eval_runtime": 3.0}, {"step": 5, "train_loss": 0.3, "total_flos": 1e9}]
    return save_log(tmp_path / "run", rows)


def colored(path: Path) -> int:
    """Pixels of curves: all else is black, white or gray."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels.max(-1) - pixels.min(-1)) > 60).sum())


def test_curves(lavit, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "curves.png"
    result = lavit("plot", run, "-o", output)
    assert result.exit_code == 0 and result.stdout == f"Wrote {output}\n", result.stderr
    everything = colored(output)
    assert everything > 500 and [path.name for path in output.parent.iterdir()] == ["curves.png"]
    for suffix in ("webp", "bmp", "jpg"):
        assert lavit("plot", run, "--metric", "loss", "-o", output.with_suffix(f".{suffix}")).exit_code == 0
    with Image.open(output.with_suffix(".webp")) as one, Image.open(output) as all_of_them:
        assert all_of_them.width > one.width, "a plot for the loss, one for the learning rate"
    unknown = lavit("plot", run, "--metric", "perplexity", "-o", output)
    assert unknown.exit_code == 1 and "perplexity: nobody logged that" in unknown.stderr
    assert "loss, learning_rate" in unknown.stderr and "epoch" not in unknown.stderr


def test_names_of_metrics(lavit, run: Path, tmp_path: Path) -> None:
    """Regression: the step is no curve, and a metric may be called what the training called it."""
    output = tmp_path / "curves.png"
    refused = lavit("plot", run, "--metric", "step", "-o", output)
    assert refused.exit_code == 1 and "step: nobody logged that. There are loss, learning_rate." in refused.stderr
    assert not output.exists()
    contents = []
    for names in (["loss"], ["eval_loss"], ["eval_loss", "loss"]):
        options = [option for name in names for option in ("--metric", name)]
        assert lavit("plot", run, *options, "-o", output).exit_code == 0
        contents.append(output.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_runs_are_compared(lavit, run: Path, tmp_path: Path) -> None:
    other = save_log(tmp_path / "deep" / "run", [{"step": step, "loss": 2 / step} for step in range(1, 6)])
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    assert lavit("plot", run, run, "--metric", "loss", "-o", alone).exit_code == 0
    assert lavit("plot", run, other, "--metric", "loss", "-o", both).exit_code == 0
    # matplotlib's second color is orange.
    red, _, blue = (np.asarray(Image.open(both)).astype(int)[..., channel] for channel in range(3))
    assert (red - blue > 100).sum() > 50
    red, _, blue = (np.asarray(Image.open(alone)).astype(int)[..., channel] for channel in range(3))
    assert (red - blue > 100).sum() == 0


def test_names_of_runs_tell_them_apart() -> None:
    runs = [Path("a/b/run"), Path("a/c/run"), Path("other")]
    assert [_name(run, runs) for run in runs] == ["b/run", "c/run", "other"]


def test_a_training_that_runs_has_its_log_in_the_last_checkpoint(lavit, tmp_path: Path) -> None:
    save_log(tmp_path / "checkpoint-9", [{"step": 9, "loss": 1.0}])
    save_log(tmp_path / "checkpoint-10", [{"step": 9, "loss": 1.0}, {"step": 10, "accuracy": 0.5}])
    (tmp_path / "checkpoint-best").mkdir()
    assert lavit("plot", tmp_path, "--metric", "accuracy", "-o", tmp_path / "x.png").exit_code == 0


def test_a_finished_training_that_goes_on(lavit, tmp_path: Path) -> None:
    """Regression: the log of its first end was shown for as long as it went on."""
    save_log(tmp_path, [{"step": 9, "loss": 1.0}])
    save_log(tmp_path / "checkpoint-9", [{"step": 9, "loss": 1.0}])
    save_log(tmp_path / "checkpoint-12", [{"step": 9, "loss": 1.0}, {"step": 12, "accuracy": 0.5}])
    assert lavit("plot", tmp_path, "--metric", "accuracy", "-o", tmp_path / "x.png").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no trainer_state.json, neither itself nor in a checkpoint"),
        ("{", "is damaged: it holds no log of a training"),
        ('{"log_history": 3}', "is damaged"),
        ('{"log_history": [[1]]}', "is damaged"),
        ('{"log_history": [{"loss": 1}]}', "is damaged"),
        ('{"log_history": [{"step": 1, "epoch": 1}]}', "has no metrics: nothing was logged yet"),
    ],
)
def test_what_is_no_training(lavit, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    result = lavit("plot", tmp_path, "-o", tmp_path / "x.png")
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
