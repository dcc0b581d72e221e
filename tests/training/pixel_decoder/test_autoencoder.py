"""Training of an autoencoder: its loss, and what is saved for pixel decoders to use."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.pixel_decoder.autoencoder import (
    AutoencoderArguments,
    AutoencoderLoss,
    AutoencoderTask,
    train_autoencoder,
)
from lavit_hf.training.pixel_decoder.image_collator import ImageDataCollator
from lavit_hf.training.pixel_decoder.loss import encode_latents
from tiny_pixel_decoders import build_vae, pictures

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def build(folder: Path, **options) -> tuple[AutoencoderTask, TrainingDataset]:
    torch.manual_seed(0)
    values = {"train_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
    args = AutoencoderArguments(output_dir=str(folder), **{**values, **options})
    samples = TrainingDataset([{"image": picture} for picture in pictures(10)], text_column=None)
    rows = [samples[index] for index in range(6)]
    return AutoencoderTask(build_vae(), args, ImageDataCollator(16, 16, multiple=2), rows), samples


def test_the_loss_is_error_and_divergence(tmp_path):
    task, samples = build(tmp_path)
    given = task.prepare(task.collator([samples[0], samples[1]]))
    loss = AutoencoderLoss(task.vae, kl_weight=0.25)(**given)
    posterior = task.vae.encode(given["pixel_values"]).latent_dist
    rebuilt = task.vae.decode(posterior.mean + posterior.std * given["posterior_noise"]).sample
    error = (rebuilt - given["pixel_values"]).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    torch.testing.assert_close(loss["absolute_error"], error)
    torch.testing.assert_close(loss["kl"], kl)
    torch.testing.assert_close(loss["loss"], error + 0.25 * kl)


def test_noise_is_a_function_of_the_sample(tmp_path):
    task, samples = build(tmp_path)
    both, one = (task.prepare(task.collator(rows)) for rows in ([samples[0], samples[1]], [samples[1]]))
    assert torch.equal(both["posterior_noise"][1:], one["posterior_noise"])
    assert (both["posterior_noise"][0] != both["posterior_noise"][1]).all()


def test_what_a_run_saves(tmp_path):
    task, samples = build(tmp_path, num_validation_images=3)
    before = {name: value.clone() for name, value in task.vae.state_dict().items()}
    train_autoencoder(task.vae, task.args, samples, task.collator, task.validation_rows)
    saved = AutoencoderKL.from_pretrained(tmp_path)
    trained = saved.state_dict()
    assert all(not torch.equal(value, trained[name]) for name, value in before.items())
    pixels = task.collator(task.validation_rows)["pixel_values"]
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert encode_latents(saved, pixels, noise).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"loss", "absolute_error", "kl", "grad_norm"} < set(log[0]) and "validation_psnr" in log[-1]
    grid = np.asarray(Image.open(tmp_path / "validation" / "step-0000002.png"))
    assert grid.shape == (32, 48, 3)
    assert np.array_equal(grid[:16, :16], np.asarray(pictures(10)[0]))


def test_psnr(tmp_path, monkeypatch):
    task, _ = build(tmp_path, num_validation_images=0)
    monkeypatch.setattr(task.vae, "decode", lambda latents: type("Decoded", (), {"sample": task_pixels + 0.2}))
    task_pixels = torch.zeros(1, 3, 16, 16)
    monkeypatch.setattr(task, "_validation_pixels", lambda: [task_pixels])
    numbers, image = task.validate()
    assert numbers["psnr"] == pytest.approx(20, abs=1e-4) and image is None  # 0.1 of the range of pixels


def test_rows_to_validate_with_are_needed(tmp_path):
    task, _ = build(tmp_path)
    with pytest.raises(ValueError, match="needs `validation_rows`"):
        AutoencoderTask(task.vae, task.args, task.collator, [])
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 2; got 15"):
        ImageDataCollator(15, 16, multiple=2)


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("train_autoencoder").main
    options = {
        "dataset": "scenes",
        "num_scenes": 4,
        "validation_split": "validation",
        "num_validation_rows": 2,
        "output_dir": tmp_path,
        "height": 16,
        "width": 16,
        "train_batch_size": 2,
        "max_train_steps": 1,
    }
    main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor > 0
    with pytest.raises(SystemExit, match="Give --validation_split"):
        main(["--dataset", "scenes", "--output_dir", str(tmp_path)])
