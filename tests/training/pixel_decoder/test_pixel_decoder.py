"""Stage 3 as a whole: what it trains, what it writes, and what it refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from lavit_hf import LavitImageProcessorPil
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from lavit_hf.training.pixel_decoder.data import PixelDecoderDataCollator, PixelDecoderDataset
from lavit_hf.training.pixel_decoder.pixel_decoder import (
    PixelDecoderArguments,
    build_pixel_decoder,
    replace_token_decoder,
    train_pixel_decoder,
    with_condition_heads,
)
from tiny_models import build_visual_tokenizer
from tiny_pixel_decoders import (
    EPSILON,
    build_pipeline,
    build_token_decoder,
    build_vae,
    pictures,
    rows,
    share_codes,
    unet_config,
)
from training.pixel_decoder.tiny_trainers import OPTIONS, build_trainer


def train(folder: Path, pipeline=None, samples: list[dict] | None = None, validation: int = 0, **options):
    """Trains a tiny decoder; returns it and its log."""
    pipeline = build_pipeline() if pipeline is None else pipeline
    values = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "use_ema": False}
    args = PixelDecoderArguments(output_dir=str(folder), **{**OPTIONS, **values, **options})
    dataset = PixelDecoderDataset(rows(12) if samples is None else samples)
    trainer = train_pixel_decoder(
        pipeline,
        args,
        dataset,
        PixelDecoderDataCollator(pipeline, seed=args.seed),
        validation_rows=[dataset[index] for index in range(validation)],
    )
    return pipeline, [line for line in trainer.state.log_history if "train_loss" not in line]


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {"unet": pipeline.unet, "token_decoder": pipeline.token_decoder, "vae": pipeline.vae}
    state = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    return {name: value.clone() for name, value in state.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def parameter_names(module, prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name, _ in module.named_parameters()}


@pytest.mark.parametrize("highres", [True, False])
def test_unet_and_heads_are_trained_and_nothing_else(tmp_path, highres):
    pipeline = build_pipeline(highres)
    before = weights(pipeline)
    train(tmp_path, pipeline, max_steps=1)
    decoder = parameter_names(pipeline.token_decoder, "token_decoder")
    heads = {name for name in decoder if name.split(".")[1] in ("condition_projections", "pooler")}
    assert changed(before, weights(pipeline)) == parameter_names(pipeline.unet, "unet") | heads
    assert {name.split(".")[1] for name in heads} == {"condition_projections"} | ({"pooler"} if highres else set())


def test_the_token_decoder_but_for_its_codebook_is_trained_on_request(tmp_path):
    pipeline = build_pipeline(highres=True)
    before = weights(pipeline)
    train(tmp_path, pipeline, max_steps=1, train_token_decoder=True)
    trained = parameter_names(pipeline.unet, "unet") | parameter_names(pipeline.token_decoder, "token_decoder")
    assert changed(before, weights(pipeline)) == trained - {"token_decoder.codebook.weight"}


def test_timesteps_are_biased_in_training_and_not_in_validation(tmp_path):
    pipeline = build_pipeline()
    collator = PixelDecoderDataCollator(pipeline)
    batch = collator([{**row, "sample_id": index, "epoch": 0} for index, row in enumerate(rows(12) * 20)])
    bias = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0, "timestep_bias_portion": 0.5}
    biased, plain = (build_trainer(tmp_path, pipeline, collator, **options) for options in (bias, {}))
    share = {}
    for trainer in (biased, plain):
        for mode in (True, False):
            trainer.model.train(mode)
            timesteps = trainer.prepare(batch)["timesteps"]
            share[trainer is biased, mode] = (timesteps >= 500).float().mean().item()
    assert share[True, True] == pytest.approx(0.75, abs=0.08)
    assert share[True, False] == share[False, False] == share[False, True] == pytest.approx(0.5, abs=0.08)


def test_the_visual_tokenizer_is_frozen_and_its_codes_are_used(tmp_path):
    pipeline, tokenizer = build_pipeline(), build_visual_tokenizer()
    share_codes(pipeline.token_decoder, tokenizer)
    collator = PixelDecoderDataCollator(
        pipeline, image_processor=LavitImageProcessorPil(size={"height": 16, "width": 16})
    )
    samples = [{"images": [image], "sample_id": index, "epoch": 0} for index, image in enumerate(pictures(3))]
    batch = collator(samples)
    trainer = build_trainer(tmp_path, pipeline, collator, tokenizer)
    given = trainer.prepare(batch)
    expected = tokenizer.encode(batch["tokenizer_pixel_values"])
    assert torch.equal(given["codes"], expected.codes) and torch.equal(given["num_tokens"], expected.num_tokens)
    trainer.model(**given)["loss"].backward()
    frozen = [*tokenizer.parameters(), *pipeline.vae.parameters(), *pipeline.token_decoder.layers.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad is not None for parameter in trainer.trained.values())
    with pytest.raises(ValueError, match="no codes, and there is no visual tokenizer"):
        build_trainer(tmp_path, pipeline, collator).prepare(batch)


@pytest.mark.parametrize(
    ("codes", "message"), [({}, "not the same .they differ."), ({"codebook_size": 20}, r"\[20, 6\] and \[24, 6\]")]
)
def test_codes_of_another_visual_tokenizer_are_refused(tmp_path, codes, message):
    """Regression: training went on with codes that meant something else to the token decoder."""
    with pytest.raises(ValueError, match=f"{message}.*visual_tokenizer and the token_decoder of one stage 1"):
        build_trainer(tmp_path, tokenizer=build_visual_tokenizer(**codes))


def test_what_a_run_writes(tmp_path):
    pipeline, log = train(
        tmp_path,
        validation=6,
        eval_strategy="steps",
        eval_steps=2,
        num_validation_images=3,
        validation_inference_steps=2,
        use_ema=True,
    )
    assert [line["step"] for line in log] == [1, 2, 2, 3, 3]
    assert set(log[0]) == {"step", "epoch", "loss", "without_codes", "grad_norm", "learning_rate"}
    assert set(log[2]) == {"step", "epoch", "eval_loss"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_index.json",
        "pipeline_lavit_pixel_decoder.py",
        "scheduler",
        "token_decoder",
        "trainer_state.json",
        "unet",
        "vae",
        "validation",
    }
    images = sorted((tmp_path / "validation").iterdir())
    assert [path.name for path in images] == ["step-0000002.png", "step-0000003.png"]
    grid = np.asarray(Image.open(images[-1]))
    truth = np.concatenate([np.asarray(row["image"]) for row in rows(3)], axis=1)
    assert grid.shape == (32, 48, 3) and np.array_equal(grid[:16], truth) and grid[16:].std() > 0
    saved = LavitPixelDecoderPipeline.from_pretrained(tmp_path)
    assert not changed(weights(pipeline), weights(saved))
    again = saved([torch.tensor([1, 2])], num_inference_steps=1, output_type="pt").images
    assert again.isfinite().all() and again.shape == (1, 3, 16, 16)


def test_validation_does_not_change_training(tmp_path):
    first, log = train(tmp_path / "a", use_ema=True)
    second, validated = train(tmp_path / "b", use_ema=True, validation=4, eval_strategy="steps", eval_steps=1)
    assert not changed(weights(first), weights(second))
    assert [line for line in validated if "loss" in line] == log
    assert (tmp_path / "b" / "validation" / "step-0000001.png").is_file()


def test_the_averaged_weights_are_saved(tmp_path):
    snapshots = []
    start = weights(build_pipeline())
    for steps in (1, 2):
        pipeline, _ = train(tmp_path / str(steps), max_steps=steps)
        snapshots.append(weights(pipeline))
    averaged, _ = train(tmp_path / "ema", max_steps=2, use_ema=True, ema_decay=0.1)
    # Without warmup of the decay the first update replaces the average, the second one moves it by 1 - decay.
    result = weights(averaged)
    for name in changed(start, snapshots[0]):
        torch.testing.assert_close(result[name], 0.1 * snapshots[0][name] + 0.9 * snapshots[1][name], msg=name)


def test_accumulated_batches_equal_a_larger_one(tmp_path):
    options = {"adam_epsilon": 1e-2}  # or else rounding decides about weights that hardly get a gradient
    large, log = train(tmp_path / "a", per_device_train_batch_size=4, **options)
    small, accumulated = train(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for line, other in zip(log, accumulated, strict=True):
        assert line == pytest.approx(other, abs=1e-5)
    assert max((value - weights(small)[name]).abs().max() for name, value in weights(large).items()) < 1e-5


def test_gradient_checkpointing_changes_no_number(tmp_path):
    options = {"train_token_decoder": True, "max_steps": 2}
    _, log = train(tmp_path / "a", **options)
    checkpointed, other = train(tmp_path / "b", **options, gradient_checkpointing=True)
    assert checkpointed.unet.is_gradient_checkpointing and checkpointed.token_decoder.layers[0].gradient_checkpointing
    for line, again in zip(log, other, strict=True):
        assert line == pytest.approx(again, abs=1e-5)


def test_mixed_precision(tmp_path):
    _, exact = train(tmp_path / "a", max_steps=1)
    AcceleratorState._reset_state()  # where accelerate keeps the precision of a process, once and for all
    pipeline, rounded = train(tmp_path / "b", max_steps=1, bf16=True)
    AcceleratorState._reset_state()
    assert exact[0]["loss"] != rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert {value.dtype for value in weights(pipeline).values()} == {torch.float32}


def test_epochs_and_learning_rate(tmp_path):
    _, log = train(tmp_path, max_steps=-1, num_train_epochs=2, lr_scheduler_type="linear", warmup_steps=2)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    rates = [line["learning_rate"] for line in log]  # that it was made with
    assert rates == pytest.approx([0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert len({line["loss"] for line in log}) == 6


def test_every_epoch_brings_new_noise(tmp_path):
    _, log = train(tmp_path, samples=rows(4), learning_rate=1e-12, max_steps=2)
    assert abs(log[0]["loss"] - log[1]["loss"]) > 1e-3


def test_the_token_decoder_can_have_its_own_learning_rate(tmp_path):
    trainer = build_trainer(tmp_path, learning_rate=0.1, head_learning_rate=0.5, weight_decay=0.25)
    unet, heads = trainer.create_optimizer().param_groups
    assert (unet["lr"], heads["lr"]) == (0.1, 0.5)
    assert unet["weight_decay"] == heads["weight_decay"] == 0.25
    assert {id(value) for value in heads["params"]} == {
        id(value) for value in trainer.pipeline.token_decoder.condition_projections.parameters()
    }


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    pipeline = build_pipeline()
    torch.nn.init.constant_(pipeline.unet.conv_out.weight, math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan in update 1: training stops before"):
        train(tmp_path, pipeline)
    assert not (tmp_path / "model_index.json").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    pipeline = build_pipeline()
    before = weights(pipeline)
    pipeline.unet.conv_out.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="grad_norm is (nan|inf) in update 1"):
        train(tmp_path, pipeline)
    assert not changed(before, weights(pipeline))


def test_images_without_codes_are_reported_once(tmp_path, caplog):
    samples = [{**row, "codes": [[]]} for row in rows(8)]
    _, log = train(tmp_path, samples=samples, max_steps=2)
    assert [line["without_codes"] for line in log] == [1, 1]
    assert sum("There are no codes to draw sample" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1; got 0"),
        ({"condition_dropout": 1.0}, "`condition_dropout` must be in"),
        ({"timestep_bias_strategy": "range"}, "`timestep_bias_strategy` must be none, earlier or later; got 'range'"),
        ({"timestep_bias_multiplier": 0.0}, "`timestep_bias_multiplier` must be positive"),
        ({"timestep_bias_portion": 1.0}, "`timestep_bias_portion` must be between 0 and 1"),
        ({"train_sampling_strategy": "sequential"}, "`train_sampling_strategy` must be random; got 'sequential'"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be false"),
        ({"push_to_hub": True}, "`push_to_hub` is not for this training: `lavit publish` uploads what"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not for this training: there are no labels"),
        ({"fsdp": "full_shard"}, "`fsdp` is not for this training: every process needs whole networks"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"save_total_limit": 0}, "`save_total_limit` must be at least 1"),
        ({"per_device_train_batch_size": 13}, "The dataset has 12 samples, but one update takes 13"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


def test_one_process_does_not_share_a_batch_among_gpus(tmp_path, monkeypatch):
    """`DataParallel` would cut the codes of all images at some place."""
    monkeypatch.setattr(PixelDecoderArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="cannot train on 2 GPUs here. Start one for each with `accelerate launch`"):
        build_trainer(tmp_path)


def test_latents_that_do_not_fit(tmp_path):
    pipeline = build_pipeline()
    pipeline.register_modules(vae=build_vae(latent_channels=3))
    with pytest.raises(ValueError, match="latents have 3 channels, but the U-Net takes 4"):
        build_trainer(tmp_path, pipeline)


def test_new_heads_keep_the_rest_of_the_token_decoder():
    decoder = build_token_decoder(num_negative_tokens=3)
    changed_heads = with_condition_heads(decoder, [5, 7], pooled_size=9)
    output = changed_heads(torch.tensor([1, 2, 3]), [3])
    assert output.condition.shape == (1, 16, 12) and output.pooled_condition.shape == (1, 9)
    torch.testing.assert_close(output.features, decoder(torch.tensor([1, 2, 3]), [3]).features)
    assert output.negative_attention_mask is None


def test_a_new_pixel_decoder_keeps_heads_that_fit():
    decoder = build_token_decoder()
    pipeline = build_pixel_decoder(decoder, build_vae(latent_channels=3), unet_config(), EPSILON)
    assert pipeline.token_decoder is decoder and pipeline.unet.config.in_channels == 3
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    highres = build_pixel_decoder(decoder, build_vae(), unet_config(highres=True))
    assert highres.is_highres and highres.token_decoder.config.pooled_size == 10
    assert highres.scheduler.config.prediction_type == "v_prediction"


def test_other_codes_keep_the_heads():
    pipeline, other = build_pipeline(), build_token_decoder(codebook_size=11, cross_attention_dims=[5])
    before = pipeline.token_decoder
    replace_token_decoder(pipeline, other)
    new = pipeline.token_decoder
    assert new.config.codebook_size == 11 and len(pipeline([[10, 3]], num_inference_steps=1).images) == 1
    features = other(torch.tensor([1, 10]), [2]).features
    torch.testing.assert_close(new(torch.tensor([1, 10]), [2]).features, features)
    condition = torch.cat([project(features) for project in before.condition_projections], dim=-1)
    torch.testing.assert_close(new(torch.tensor([1, 10]), [2]).condition, condition)
    with pytest.raises(ValueError, match="heads are for features of width"):
        replace_token_decoder(pipeline, build_token_decoder(output_size=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": [12, 12]}, "one `cross_attention_dim` for all blocks"),
        ({"addition_embed_type": "text"}, "must be 'text_time', as in SDXL, or null; got 'text'"),
        ({"projection_class_embeddings_input_dim": 24}, "leaves no room for a pooled condition"),
    ],
)
def test_unet_configurations_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        build_pixel_decoder(build_token_decoder(), build_vae(), {**unet_config(highres=True), **change})
