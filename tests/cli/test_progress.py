"""Commands that take long show a bar on a terminal, however small the checkpoint, and print lines to a log."""

import io
import sys
from pathlib import Path

import datasets
import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

import lavit_cli
from lavit_cli import loading
from lavit_cli.loading import load_pipeline
from lavit_hf.data.scenes import make_scenes
from lavit_hf.pipelines import LavitTextToImagePipeline
from lavit_hf.utils import progress

COMMANDS = {
    "Captioning": ["caption", "{photo}", "{photo}", "{photo}", "-m", "{model}", "--batch-size", "1"],
    "Tokenizing": ["tokenize", "{folder}/data", "{folder}/codes", "-m", "{model}", "--batch-size", "1"],
    "caption": ["evaluate", "{model}", "-t", "caption", "--data", "scenes", "--num-samples", "2", "-o", "{folder}/e"],
    "Writing": ["convert", "{original}", "{folder}/new", "--heads", "vision=4,merger=4,decoder=4"],
    "Writing  ": ["assemble", "{model}", "{model}", "{folder}/joined"],
    "Writing ": ["export-llama", "{model}", "{folder}/llama"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(arguments: list[str], stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        lavit_cli.app(arguments, standalone_mode=False)
    return stderr.getvalue()


@pytest.mark.parametrize("title", COMMANDS)
def test_bars_and_lines(
    title: str, photo: Path, random_checkpoint: Path, original_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_scenes(num_scenes=3).select_columns(["image", "text"]).save_to_disk(tmp_path / "data")
    shown = {}
    for kind in ("terminal", "log"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "data").symlink_to(tmp_path / "data")
        names = {"photo": photo, "model": random_checkpoint, "original": original_dir, "folder": tmp_path / kind}
        arguments = [argument.format(**names) for argument in COMMANDS[title]]
        if kind == "terminal":
            shown[kind] = run(arguments, Terminal(), monkeypatch)
        else:
            monkeypatch.setattr(progress, "_LOG_SECONDS", 1e-9)
            shown[kind] = run(arguments, io.StringIO(), monkeypatch)
    title = title.strip()
    assert f"\r{title}: " in shown["terminal"]
    lines = [line for line in shown["log"].split("\n") if line.startswith(f"{title}: ")]
    assert lines and not any("\r" in line for line in lines)
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


def test_bars_of_drawing(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(loading.load(str(random_checkpoint)))
    assert pipeline._progress_bar_config == pipeline.pixel_decoder._progress_bar_config
    assert pipeline._progress_bar_config["desc"] == "Drawing" and pipeline._progress_bar_config["mininterval"] == 30
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert "mininterval" not in load_pipeline(loading.load(str(random_checkpoint)))._progress_bar_config
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


@pytest.mark.parametrize("is_small", [True, False])
def test_bars_of_loading_and_downloads_are_hidden_for_small_checkpoints_alone(
    is_small: bool, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' switch is that of huggingface_hub's downloads, too."""
    lavit, shown, load = loading.load(str(random_checkpoint)), [], LavitTextToImagePipeline.from_pretrained

    def look(*args, **kwargs):
        shown.append(logging.is_progress_bar_enabled() and not are_progress_bars_disabled())
        return load(*args, **kwargs)

    monkeypatch.setattr(LavitTextToImagePipeline, "from_pretrained", look)
    monkeypatch.setattr(loading, "_BAR_BYTES", loading._BAR_BYTES if is_small else 1000)
    load_pipeline(lavit)
    with loading.bars_of_loading("user/name"):
        look(str(random_checkpoint), model=lavit.model, processor=lavit.processor)
    assert shown == [not is_small, True]
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


def test_nothing_is_shown_of_loading_what_is_small_whatever_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with loading.without_bars(diffusers_logging):
        assert not diffusers_logging.is_progress_bar_enabled()
    assert diffusers_logging.is_progress_bar_enabled()
