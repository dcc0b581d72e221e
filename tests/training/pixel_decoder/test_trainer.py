"""A killed run goes on as if nothing had happened, and two processes train like one with twice the batch."""

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

from lavit_hf.training.pixel_decoder.data import PixelDecoderDataCollator, PixelDecoderDataset
from lavit_hf.training.pixel_decoder.pixel_decoder import (
    PixelDecoderArguments,
    PixelDecoderTrainer,
    train_pixel_decoder,
)
from lavit_hf.training.pixel_decoder.trainer import AveragedNetworks, AveragingCallback, UpdateSampler
from lavit_hf.training.trainer_checkpoints import why_incomplete
from tiny_pixel_decoders import build_pipeline, rows
from training.pixel_decoder.tiny_trainers import OPTIONS, build_trainer

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "train_pixel_decoder.py"

# Runs the example until it writes a checkpoint, which it is killed in the middle of.
KILLED = """
import os, runpy, signal, sys
from transformers import TrainerState

save_to_json = TrainerState.save_to_json

def die_before(self, path):
    if os.path.exists(os.path.join(os.path.dirname(path), "..", "checkpoint-4")) and "checkpoint-6" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    save_to_json(self, path)

TrainerState.save_to_json = die_before
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
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [str(EXAMPLE), *[part for name, value in values.items() for part in (f"--{name}", str(value))]]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture
def example_main(monkeypatch):
    """The example, in this process."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    main = importlib.import_module("train_pixel_decoder").main
    return lambda arguments: main(arguments[1:])


def log_of(folder: Path) -> list[dict]:
    """What was logged, but for times."""
    return [line for line in state_of(folder)["log_history"] if "train_loss" not in line]


def state_of(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def saved(folder: Path) -> dict[str, torch.Tensor]:
    files = ("unet/diffusion_pytorch_model.safetensors", "token_decoder/model.safetensors")
    return {f"{file}:{name}": value for file in files for name, value in load_file(folder / file).items()}


def test_a_killed_run_goes_on_bit_by_bit(python, sources, tmp_path, example_main):
    # Five updates are an epoch: the run goes on in the middle of the first one, and ends in the middle of the second.
    options = {"save_steps": 2, "save_total_limit": 1}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    example_main(command(sources, whole, **options))
    died = run([python, "-c", KILLED, *command(sources, killed, **options)])
    assert died.returncode == -signal.SIGKILL, died.stderr
    # The third checkpoint was not complete, and the second one is still there.
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert why_incomplete(killed / "checkpoint-6") == "it has no trainer_state.json"
    example_main(command(sources, killed, **options, resume_from_checkpoint="latest"))
    assert log_of(killed) == log_of(whole) and len(log_of(whole)) == 8
    expected, found = saved(whole), saved(killed)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())
    assert [path.name for path in killed.glob("*checkpoint*")] == ["checkpoint-8"]


def test_two_processes_equal_one_with_twice_the_batch(python, sources, tmp_path, example_main):
    """Also if they go on after an interruption: in the third update of the second epoch, bit by bit."""
    options = {"adam_epsilon": 1e-2, "num_validation_rows": 3, "validation_split": "train", "save_steps": 7}
    example_main(command(sources, tmp_path / "one", **options))
    launch = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]  # on a CPU accelerate starts several if it is told that they have GPUs
    half = command(sources, tmp_path / "two", **options, per_device_train_batch_size=2)
    done = run([*launch, *half])
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "two" / "checkpoint-7"
    assert (checkpoint / "rng_state_1.pth").is_file()  # there were two
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert line == pytest.approx(other, abs=1e-5)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert max((value - two[name]).abs().max() for name, value in one.items()) < 1e-5
    done = run([*launch, *half, "--resume_from_checkpoint", str(checkpoint)])
    assert done.returncode == 0, done.stderr
    again = saved(tmp_path / "two")
    assert all(torch.equal(value, again[name]) for name, value in two.items())


@pytest.fixture
def trained(tmp_path):
    """A run of two updates with a checkpoint of the first one, and how to start another one there."""

    def train(**options) -> PixelDecoderTrainer:
        pipeline = build_pipeline()
        values = {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        args = PixelDecoderArguments(**{**OPTIONS, "output_dir": str(tmp_path), **values, **options})
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
    log, weights = log_of(tmp_path), saved(tmp_path)
    assert trained(resume_from_checkpoint="latest").state.global_step == 2
    again = saved(tmp_path)
    assert log_of(tmp_path) == log and all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_run_that_finished_in_the_middle_of_an_epoch_has_nothing_left_to_do(trained, tmp_path):
    trained(resume_from_checkpoint="latest", max_steps=3)  # two updates are an epoch
    log, weights = log_of(tmp_path), saved(tmp_path)
    assert trained(resume_from_checkpoint="latest", max_steps=3).state.global_step == 3
    again = saved(tmp_path)
    assert log_of(tmp_path) == log and all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_run_can_go_on_for_longer(trained, tmp_path):
    trained(resume_from_checkpoint="latest", max_steps=4)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


def test_what_a_killed_run_left_is_cleaned_even_if_nothing_is_left_to_do(trained, tmp_path):
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trained(resume_from_checkpoint="latest")
    assert not (tmp_path / "checkpoint-3").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_checkpoint_leaves_nothing(trained, tmp_path, monkeypatch):
    save = torch.save

    def fill_the_disk(value, path, *args, **kwargs):
        if "checkpoint-3" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        trained(resume_from_checkpoint="latest", max_steps=3)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_is_no_mixture_with_an_older_one_of_its_name(trained, tmp_path, monkeypatch):
    """Killed while it writes checkpoint-2 once more, a run must not leave one that looks complete."""

    def die(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainerState, "save_to_json", die)
    for module in ("trainer_checkpoints", "pixel_decoder.trainer"):  # as if it was killed
        monkeypatch.setattr(f"lavit_hf.training.{module}.remove_incomplete_checkpoints", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        trained(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert why_incomplete(tmp_path / "checkpoint-2") == "it has no trainer_state.json"


def test_only_what_was_trained_is_in_a_checkpoint(trained, tmp_path):
    """The VAE is not; the average has the trained weights only."""
    pipeline = build_pipeline()
    expected = {f"networks.unet.{name}" for name in pipeline.unet.state_dict()}
    expected |= {f"networks.token_decoder.{name}" for name in pipeline.token_decoder.state_dict()}
    heads = list(pipeline.token_decoder.condition_projections.parameters())
    count = len(list(pipeline.unet.parameters())) + len(heads)
    expected |= {"average.n_averaged", *(f"average.module.{index}" for index in range(count))}
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == expected


def test_a_new_run_does_not_mix_with_an_old_one(trained):
    with pytest.raises(FileExistsError, match="holds checkpoints of another run .checkpoint-2.*or choose another"):
        trained()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"per_device_train_batch_size": 2}, "samples_per_update was 4, is 2"),
        ({"train_token_decoder": True}, "trained_parameters was"),
        ({"use_ema": False}, "use_ema was True, is False"),
    ],
)
def test_a_checkpoint_of_another_run(trained, change, message):
    for ignore_data_skip in (False, True):  # in other stages, this lets other samples follow
        with pytest.raises(ValueError, match=message):
            trained(resume_from_checkpoint="latest", ignore_data_skip=ignore_data_skip, **change)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


def _pickle_evil(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil()))


def _zip_evil(path: Path) -> None:
    torch.save({"state": _Evil()}, path)


@pytest.mark.parametrize("write", [_pickle_evil, _zip_evil])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_resuming_runs_no_code(trained, tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=f"checkpoint-2.*{name}"):
        trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"), max_steps=3)
    assert not (tmp_path / "ran-code").exists()


def test_the_weights_are_no_pickle_either(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    _zip_evil(tmp_path / "checkpoint-2" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than data, or is damaged"):
        trained(resume_from_checkpoint="latest", max_steps=3)
    assert not (tmp_path / "ran-code").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rng_state.pth", "(rng_state.pth is missing or damaged|has no rng_state.pth)"),
        ("model.safetensors", "(model.safetensors is missing or damaged|has no weights)"),
        ("optimizer.pt", "(optimizer.pt is missing or damaged|has no optimizer.pt)"),
        ("scheduler.pt", "(scheduler.pt is missing or damaged|has no scheduler.pt)"),
        ("trainer_state.json", "(trainer_state.json is damaged|has no trainer_state.json)"),
        ("run.json", "(run.json is damaged|has no run.json)"),
    ],
)
def test_damaged_files_are_not_overlooked(trained, tmp_path, name, message):
    checkpoint = tmp_path / "checkpoint-2"
    content = (checkpoint / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content), None):
        (checkpoint / name).unlink() if damaged is None else (checkpoint / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"checkpoint-2.*{message}"):
            trained(resume_from_checkpoint=str(checkpoint), max_steps=3)


def test_no_checkpoint(trained, tmp_path):
    with pytest.raises(ValueError, match="checkpoint-7 is no complete checkpoint: there is no such directory"):
        trained(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    trained(resume_from_checkpoint="latest", output_dir=str(tmp_path / "new"))
    assert len(log_of(tmp_path / "new")) == 2


# The average of the weights: what it is, where it is kept, and when it is used.


@pytest.fixture
def networks() -> nn.Module:
    torch.manual_seed(0)
    networks = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    networks[0].bias.requires_grad_(False)
    return networks


@torch.no_grad()
def change(networks: nn.Module) -> None:
    for value in networks.parameters():
        value.add_(torch.randn_like(value))


def test_it_is_that_of_diffusers(networks):
    model = AveragedNetworks(networks, decay=0.6)  # reached after 11 updates
    trained = [value for value in networks.parameters() if value.requires_grad]
    expected = EMAModel(trained, decay=0.6)
    for _ in range(20):
        change(networks)
        model.update_average()
        expected.step(trained)
        for average, shadow in zip(model.average.module, expected.shadow_params, strict=True):
            torch.testing.assert_close(average, shadow)


def test_it_is_restored_with_the_module_and_not_trained(networks):
    model = AveragedNetworks(networks, decay=0.6)
    for _ in range(3):
        change(networks)
        model.update_average()
    restored = AveragedNetworks(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False), None)
    assert restored.average is None and len(restored.trained) == 0
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other[0].bias.requires_grad_(False)
    restored = AveragedNetworks(other, decay=0.6)
    restored.load_state_dict(model.state_dict())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        "networks.0.weight",
        "networks.1.weight",
        "networks.1.bias",
    }
    for one in (model, restored):
        with torch.no_grad():
            one.networks[1].bias.fill_(1.0)
        one.update_average()
    assert all(torch.equal(*pair) for pair in zip(model.average.module, restored.average.module, strict=True))


def test_weights_come_back_after_the_averaged_ones_were_used(networks):
    model = AveragedNetworks(networks, decay=0.6)
    for _ in range(2):
        change(networks)
        model.update_average()
    before = [value.clone() for value in networks.parameters()]
    with model.averaged():
        averaged = networks[0].weight.clone()
    assert torch.equal(averaged, model.average.module[0]) and not torch.equal(averaged, before[0])
    assert all(torch.equal(value, old) for value, old in zip(networks.parameters(), before, strict=True))
    model.use_average()
    assert torch.equal(networks[0].weight, averaged) and torch.equal(networks[0].bias, before[1])


def test_updates_that_a_gradient_scaler_skips_do_not_count(networks):
    model, callback = AveragedNetworks(networks, decay=0.6), AveragingCallback()
    for was_skipped in (True, False, True):
        optimizer = SimpleNamespace(step_was_skipped=was_skipped)
        callback.on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    assert model.average.n_averaged == 1


def test_options_of_checkpointing_are_not_ignored(networks):
    with pytest.raises(ValueError, match="`gradient_checkpointing_kwargs` do nothing here"):
        AveragedNetworks(networks, None).gradient_checkpointing_enable({"use_reentrant": True})


# Every update sees the same samples, however many processes share it.


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def updates(
    batch_size: int, accumulation: int, processes: int, start: int = 0, num_samples: int = 30
) -> list[set[int]]:
    """Samples of every update from one on, to the end of its epoch, as accelerate divides and skips batches."""
    update_size = batch_size * accumulation * processes
    sampler = UpdateSampler(num_samples, update_size, seed=3)
    epoch, first = divmod(start, num_samples // update_size)
    sampler.set_epoch(epoch)
    parts = []
    for index in range(processes):
        loader = DataLoader(range(num_samples), batch_size=batch_size, sampler=sampler)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=index)
        loader = skip_first_batches(loader, first * accumulation)
        loader.set_epoch(epoch)  # as `Trainer` does
        batches = [batch.tolist() for batch in loader]
        assert len(batches) == len(loader) and all(len(batch) == batch_size for batch in batches)
        parts.append([flat(batches[at : at + accumulation]) for at in range(0, len(batches), accumulation)])
    joined = [flat(shares) for shares in zip(*parts, strict=True)]
    assert all(len(set(update)) == len(update) for update in joined)
    return [set(update) for update in joined]


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_updates_do_not_depend_on_how_they_are_divided(batch_size, accumulation, processes):
    whole = updates(8, 1, 1)
    assert updates(batch_size, accumulation, processes) == whole and len(whole) == 3
    assert sum(map(len, whole)) == len(set.union(*whole)) == 24


def test_a_resumed_run_sees_what_is_left():
    first, second = updates(8, 1, 1), updates(8, 1, 1, start=3)
    assert updates(8, 1, 1, start=1) == first[1:]
    assert updates(2, 2, 2, start=5) == second[2:]
    assert first != second and len(second) == 3


def test_the_order_is_random_and_reproducible():
    def order(seed: int) -> list[int]:
        return list(UpdateSampler(30, 10, seed))

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(30)) != order(0)


def test_a_dataset_smaller_than_an_update():
    with pytest.raises(ValueError, match="has 7 samples, but one update takes 8 .batch size x accumulated batches x"):
        UpdateSampler(7, 8, seed=0)


# Where pictures of a validation go.


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
