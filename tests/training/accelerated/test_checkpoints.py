"""A killed run goes on as if nothing had happened, and two processes train like one with twice the batch."""

import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lavit_hf.training.pixel_decoder.collator import PixelDecoderDataCollator
from lavit_hf.training.pixel_decoder.dataset import PixelDecoderDataset
from lavit_hf.training.pixel_decoder.task import PixelDecoderArguments, train_pixel_decoder
from tiny_pixel_decoders import build_pipeline, rows

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "train_pixel_decoder.py"

# Runs the example until it writes a checkpoint, which it is killed in the middle of.
KILLED = """
import os, runpy, signal, sys
from accelerate import Accelerator

save_state = Accelerator.save_state

def save_and_die(self, folder):
    save_state(self, folder)
    if os.path.exists(os.path.join(os.path.dirname(folder), "checkpoint-4")):
        os.kill(os.getpid(), signal.SIGKILL)

Accelerator.save_state = save_and_die
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A pixel decoder and a dataset on disk."""
    folder = tmp_path_factory.mktemp("sources")
    build_pipeline(highres=True).save_pretrained(folder / "decoder")
    features = datasets.Features({"image": datasets.Image(), "codes": [[datasets.Value("int32")]]})
    columns = {name: [row[name] for row in rows(22)] for name in ("image", "codes")}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "data"))
    return {"pixel_decoder": str(folder / "decoder"), "dataset": str(folder / "data")}


def command(sources: dict[str, str], output: Path, **options) -> list[str]:
    values = {
        **sources,
        "output_dir": output,
        "max_train_steps": 8,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "logging_steps": 1,
        **options,
    }
    return [str(EXAMPLE), *[part for name, value in values.items() for part in (f"--{name}", str(value))]]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def example_main(monkeypatch):
    """The example, in this process."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    main = importlib.import_module("train_pixel_decoder").main
    return lambda arguments: main(arguments[1:])


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    files = ("unet/diffusion_pytorch_model.safetensors", "token_decoder/model.safetensors")
    return {f"{file}:{name}": value for file in files for name, value in load_file(folder / file).items()}


def test_a_killed_run_goes_on_bit_by_bit(sources, tmp_path, example_main):
    # Five updates are an epoch: the run goes on in the middle of the first one, and ends in the middle of the second.
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    options |= {"gradient_accumulation_steps": 2, "train_batch_size": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    example_main(command(sources, whole, **options))
    died = run([sys.executable, "-c", KILLED, *command(sources, killed, **options)])
    assert died.returncode == -signal.SIGKILL, died.stderr
    # The third checkpoint was not complete, and the second one is still there.
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint-4", "log.jsonl", "unfinished-checkpoint"]
    assert len(log_of(killed)) == 6
    example_main(command(sources, killed, **options, resume_from_checkpoint="latest"))
    assert log_of(killed) == log_of(whole) and len(log_of(whole)) == 8
    expected, found = saved(whole), saved(killed)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())
    assert [path.name for path in killed.glob("*checkpoint*")] == ["checkpoint-8"]


def test_two_processes_equal_one_with_twice_the_batch(sources, tmp_path, example_main):
    options = {"adam_epsilon": 1e-2, "num_validation_rows": 3, "validation_split": "train", "checkpointing_steps": 4}
    example_main(command(sources, tmp_path / "one", **options))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # On a CPU accelerate starts several processes only if it is told that they have GPUs.
    done = run(
        [*launch, "--main_process_port", "0", *command(sources, tmp_path / "two", **options, train_batch_size=2)],
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "checkpoint-8" / "random_states_1.pkl").is_file()  # there were two
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert line == pytest.approx(other, abs=1e-5)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert max((value - two[name]).abs().max() for name, value in one.items()) < 1e-5


@pytest.fixture
def trained(tmp_path):
    """A run of two updates with a checkpoint of the first one, and how to start another one there."""

    def train(**options) -> float:
        pipeline = build_pipeline()
        values = {"train_batch_size": 4, "max_train_steps": 2, "checkpointing_steps": 1, "logging_steps": 1}
        args = PixelDecoderArguments(**{"output_dir": str(tmp_path), **values, **options})
        return train_pixel_decoder(
            pipeline, args, PixelDecoderDataset(rows(8)), PixelDecoderDataCollator(pipeline, seed=args.seed)
        )

    train()
    return train


def test_all_checkpoints_are_kept_by_default(trained, tmp_path):
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_an_explicit_checkpoint(trained, tmp_path):
    log = log_of(tmp_path)
    trained(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert log_of(tmp_path) == log


def test_a_finished_run_has_nothing_left_to_do(trained, tmp_path):
    log = log_of(tmp_path)
    assert math.isnan(trained(resume_from_checkpoint="latest"))
    assert log_of(tmp_path) == log


def test_a_run_can_go_on_for_longer(trained, tmp_path):
    trained(resume_from_checkpoint="latest", max_train_steps=4)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


def test_what_a_killed_run_left_is_cleaned_even_if_nothing_is_left_to_do(trained, tmp_path):
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / ".log.jsonl.abcd1234.partial").write_bytes(b"half")
    trained(resume_from_checkpoint="latest")
    assert not (tmp_path / "unfinished-checkpoint").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_checkpoint_leaves_nothing(trained, tmp_path, monkeypatch):
    def fill_the_disk(self, folder):
        Path(folder).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        trained(resume_from_checkpoint="latest", max_train_steps=3)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_new_run_does_not_mix_with_an_old_one(trained):
    with pytest.raises(FileExistsError, match="holds checkpoints of another run .checkpoint-2.*or choose another"):
        trained()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"train_batch_size": 2}, "samples_per_update was 4, is 2"),
        ({"train_token_decoder": True}, "trained_parameters was"),
        ({"use_ema": False}, "use_ema was True, is False"),
    ],
)
def test_a_checkpoint_of_another_run(trained, change, message):
    with pytest.raises(ValueError, match=message):
        trained(resume_from_checkpoint="latest", **change)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


def _pickle_evil(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil()))


def _zip_evil(path: Path) -> None:
    torch.save({"state": _Evil()}, path)


@pytest.mark.parametrize("write", [_pickle_evil, _zip_evil])
@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "ema.safetensors"]
)
def test_resuming_runs_no_code(trained, tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=f"checkpoint-2.*({name}|holds more than data)"):
        trained(resume_from_checkpoint="latest", max_train_steps=3)
    assert not (tmp_path / "ran-code").exists()


def test_the_weights_are_no_pickle_either(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    _zip_evil(tmp_path / "checkpoint-2" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="checkpoint-2 is incomplete or damaged, or holds more than data"):
        trained(resume_from_checkpoint="latest", max_train_steps=3)
    assert not (tmp_path / "ran-code").exists()


def test_a_checkpoint_of_older_versions(trained, tmp_path):
    (tmp_path / "checkpoint-2" / "ema.safetensors").unlink()
    torch.save({"decay": 0.5}, tmp_path / "checkpoint-2" / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="custom_checkpoint_0.pkl is a pickle, .* Older versions of lavit-hf wrote"):
        trained(resume_from_checkpoint="latest", max_train_steps=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random_states_0.pkl", "random_states_0.pkl is missing, damaged, or holds more than data"),
        ("ema.safetensors", "checkpoint-2 is incomplete or damaged"),
        ("model.safetensors", "checkpoint-2 is incomplete or damaged"),
        ("optimizer.bin", "checkpoint-2 is incomplete or damaged"),
        ("run.json", "run.json is damaged"),
    ],
)
def test_damaged_files_are_not_overlooked(trained, tmp_path, name, message):
    path = tmp_path / "checkpoint-2" / name
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content), None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        error, text = (
            (FileNotFoundError, "no run.json") if (name, damaged) == ("run.json", None) else (ValueError, message)
        )
        with pytest.raises(error, match=text):
            trained(resume_from_checkpoint="latest", max_train_steps=3)


def test_averaged_weights_of_another_model(trained, tmp_path):
    path = tmp_path / "checkpoint-2" / "ema.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"0": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="ema.safetensors holds other weights than are trained"):
        trained(resume_from_checkpoint="latest", max_train_steps=3)


def test_no_checkpoint(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint-7 is no checkpoint of this training"):
        trained(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    trained(resume_from_checkpoint="latest", output_dir=str(tmp_path / "new"))
    assert len(log_of(tmp_path / "new")) == 2
