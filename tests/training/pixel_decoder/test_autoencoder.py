"""Training of an autoencoder: its loss, and what is saved for pixel decoders to use."""

import importlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.pixel_decoder.autoencoder import (
    AutoencoderArguments,
    AutoencoderLoss,
    AutoencoderTrainer,
    train_autoencoder,
)
from lavit_hf.training.pixel_decoder.data import ImageDataCollator
from lavit_hf.training.pixel_decoder.loss import encode_latents
from lavit_hf.training.streaming import StreamedTrainingDataset, StreamSource
from tiny_pixel_decoders import build_vae, pictures
from training.pixel_decoder.tiny_trainers import OPTIONS

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def build(folder: Path, **options) -> tuple[AutoencoderTrainer, TrainingDataset]:
    torch.manual_seed(0)
    values = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
    args = AutoencoderArguments(output_dir=str(folder), **{**OPTIONS, **values, **options})
    samples = TrainingDataset([{"image": picture} for picture in pictures(10)], text_column=None)
    rows = [samples[index] for index in range(6)]
    return AutoencoderTrainer(build_vae(), args, samples, ImageDataCollator(16, 16, multiple=2), rows), samples


def test_the_loss_is_error_and_divergence(tmp_path):
    trainer, samples = build(tmp_path)
    given = trainer.prepare(trainer.data_collator([samples[0], samples[1]]))
    loss = AutoencoderLoss(trainer.vae, kl_weight=0.25)(**given)
    posterior = trainer.vae.encode(given["pixel_values"]).latent_dist
    rebuilt = trainer.vae.decode(posterior.mean + posterior.std * given["posterior_noise"]).sample
    error = (rebuilt - given["pixel_values"]).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    torch.testing.assert_close(loss["absolute_error"], error)
    torch.testing.assert_close(loss["kl"], kl)
    torch.testing.assert_close(loss["loss"], error + 0.25 * kl)


def test_noise_is_a_function_of_the_sample(tmp_path):
    trainer, samples = build(tmp_path)
    both, one = (trainer.prepare(trainer.data_collator(rows)) for rows in ([samples[0], samples[1]], [samples[1]]))
    assert torch.equal(both["posterior_noise"][1:], one["posterior_noise"])
    assert (both["posterior_noise"][0] != both["posterior_noise"][1]).all()


def test_what_a_run_saves(tmp_path):
    trainer, samples = build(tmp_path, num_validation_images=3)
    before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}
    trainer = train_autoencoder(trainer.vae, trainer.args, samples, trainer.data_collator, trainer.eval_dataset)
    saved = AutoencoderKL.from_pretrained(tmp_path)
    trained = saved.state_dict()
    assert all(not torch.equal(value, trained[name]) for name, value in before.items())
    pixels = trainer.data_collator(trainer.eval_dataset)["pixel_values"]
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert encode_latents(saved, pixels, noise).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {"loss", "absolute_error", "kl", "grad_norm"} < set(log[0])
    assert [line["step"] for line in log if "eval_psnr" in line] == [2]
    grid = np.asarray(Image.open(tmp_path / "validation" / "step-0000002.png"))
    assert grid.shape == (32, 48, 3)
    assert np.array_equal(grid[:16, :16], np.asarray(pictures(10)[0]))


def test_psnr(tmp_path, monkeypatch):
    trainer, samples = build(tmp_path, num_validation_images=0)
    pixels = trainer.data_collator([samples[0], samples[1]])["pixel_values"].clamp(-0.7, 0.7)
    monkeypatch.setattr(trainer, "eval_batches", lambda rows: [{"pixel_values": pixels}])
    monkeypatch.setattr(trainer.vae, "decode", lambda latents: type("Decoded", (), {"sample": pixels + 0.2}))
    assert trainer.evaluate([samples[0], samples[1]])["eval_psnr"] == pytest.approx(
        20, abs=1e-4
    )  # a tenth of the range
    assert not (tmp_path / "validation").exists()


def test_rows_to_validate_with_are_needed(tmp_path):
    trainer, samples = build(tmp_path)
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        AutoencoderTrainer(trainer.vae, trainer.args, samples, trainer.data_collator, [])
    with pytest.raises(ValueError, match="no samples to validate with: pass an `eval_dataset`"):
        trainer.evaluate([])
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
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
    }
    main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor > 0
    with pytest.raises(SystemExit, match="Give --validation_split"):
        main(["--dataset", "scenes", "--output_dir", str(tmp_path)])


def test_streamed_pictures(tmp_path) -> None:
    trainer, _ = build(tmp_path)
    stream = datasets.Dataset.from_list([{"image": picture} for picture in pictures(10)]).to_iterable_dataset()
    streamed = StreamedTrainingDataset([StreamSource(stream, text_column=None)])
    trainer = train_autoencoder(trainer.vae, trainer.args, streamed, trainer.data_collator, trainer.eval_dataset)
    assert trainer.state.global_step == trainer.args.max_steps > 0
