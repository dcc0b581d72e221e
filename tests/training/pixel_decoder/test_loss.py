"""The loss of stage 3, against its formulas and against what the pipeline does when it draws."""

import pytest
import torch
from diffusers import DDIMScheduler

from lavit_hf.training.pixel_decoder.loss import PixelDecoderLoss, biased_timesteps, draw_diffusion, encode_latents
from tiny_pixel_decoders import EPSILON, build_pipeline

CODES = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6]), torch.tensor([23])]
SHAPE = (4, 8, 8)


def inputs(drop: bool | list[bool] = False, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    drops = drop if isinstance(drop, list) else [drop] * len(CODES)
    return {
        "latents": torch.randn(len(CODES), *SHAPE, generator=generator),
        "codes": torch.cat(CODES),
        "num_tokens": [len(codes) for codes in CODES],
        "timesteps": torch.tensor([10, 500, 990]),
        "noise": torch.randn(len(CODES), *SHAPE, generator=generator),
        "drop_condition": torch.tensor(drops),
        "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(len(CODES), -1),
    }


def loss_of(pipeline, **options) -> PixelDecoderLoss:
    return PixelDecoderLoss(pipeline.unet, pipeline.token_decoder, pipeline.scheduler.config, **options)


def record_unet(pipeline, monkeypatch) -> list[dict]:
    calls: list[dict] = []
    forward = pipeline.unet.forward

    def recorded(sample, timestep, **options):
        (prediction,) = forward(sample, timestep, **options)
        calls.append({"sample": sample, "prediction": prediction, **options})
        return (prediction,)

    monkeypatch.setattr(pipeline.unet, "forward", recorded)
    return calls


def test_draws_are_a_function_of_each_sample_seed():
    seeds = torch.tensor([11, 2**62 + 5, 13])
    batch = draw_diffusion(seeds, SHAPE, 1000, 0.5)
    again = draw_diffusion(seeds.flip(0)[:2], SHAPE, 1000, 0.5)
    for name, drawn in vars(batch).items():
        assert torch.equal(drawn[1:].flip(0), vars(again)[name])
    assert len(set(batch.timesteps.tolist())) == 3 and (batch.noise[0] - batch.noise[1]).abs().min() > 0
    assert (batch.noise - batch.posterior_noise).abs().min() > 0


def test_draws_are_spread_as_they_should_be():
    draws = draw_diffusion(torch.arange(4000), (1,), 1000, 0.1)
    assert draws.drop_condition.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert draws.timesteps.min() < 5 and draws.timesteps.max() > 994
    assert draws.timesteps.float().mean().item() == pytest.approx(499.5, abs=20)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.05)
    other = draw_diffusion(torch.arange(4000), (1,), 1000, 0.9)
    assert torch.equal(other.noise, draws.noise) and other.drop_condition.float().mean() > 0.85


def test_no_bias_leaves_every_timestep_as_it_is():
    assert torch.equal(biased_timesteps(1000, "none", 3.0, 0.5), torch.arange(1000))
    assert torch.equal(biased_timesteps(1000, "later", 1.0, 0.5), torch.arange(1000))


@pytest.mark.parametrize(("strategy", "biased"), [("later", range(60, 100)), ("earlier", range(40))])
def test_biased_timesteps_come_that_many_times_as_often(strategy, biased):
    timesteps = biased_timesteps(100, strategy, 2.0, 0.4)
    # 40 timesteps of weight 2 and 60 of weight 1: 80 of 140 draws, 57 of 100.
    assert sum(timestep in biased for timestep in timesteps.tolist()) == 57
    assert timesteps.min() in (0, 1) and timesteps.max() == 99 and len(timesteps) == 100
    assert set(biased) <= set(timesteps.tolist())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_what_the_scheduler_says_is_predicted(prediction_type, monkeypatch):
    pipeline = build_pipeline(scheduler={**EPSILON, "prediction_type": prediction_type})
    calls, given = record_unet(pipeline, monkeypatch), inputs()
    output = loss_of(pipeline)(**given)
    alpha = pipeline.scheduler.alphas_cumprod[given["timesteps"]][:, None, None, None]
    noisy = alpha.sqrt() * given["latents"] + (1 - alpha).sqrt() * given["noise"]
    velocity = alpha.sqrt() * given["noise"] - (1 - alpha).sqrt() * given["latents"]
    target = given["noise"] if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(calls[0]["sample"], noisy)
    expected = (calls[0]["prediction"] - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output["per_sample"], expected.detach())
    torch.testing.assert_close(output["loss"], expected.mean())
    assert output["without_codes"] == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    pipeline = build_pipeline(scheduler={**EPSILON, "prediction_type": prediction_type})
    plain, weighted = (loss_of(pipeline, snr_gamma=gamma)(**inputs())["per_sample"] for gamma in (None, 5.0))
    alpha = pipeline.scheduler.alphas_cumprod[inputs()["timesteps"]]
    snr = alpha / (1 - alpha)
    expected = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(weighted / plain, expected, rtol=1e-4, atol=1e-6)
    assert snr[0] > 5 > snr[1]


@pytest.mark.parametrize("highres", [True, False])
def test_conditions_are_those_the_pipeline_draws_with(highres, monkeypatch):
    pipeline = build_pipeline(highres)
    calls = record_unet(pipeline, monkeypatch)
    pipeline(CODES, num_inference_steps=1, guidance_scale=2.0, output_type="latent")
    for dropped in (True, False):
        loss_of(pipeline)(**inputs(drop=dropped))
    drawn, negative, positive = calls
    for index, half in enumerate((negative, positive)):
        part = slice(index * 3, index * 3 + 3)
        torch.testing.assert_close(half["encoder_hidden_states"], drawn["encoder_hidden_states"][part])
        if highres:
            for name in ("text_embeds", "time_ids"):
                torch.testing.assert_close(
                    half["added_cond_kwargs"][name], drawn["added_cond_kwargs"][name][part], msg=name
                )
        else:
            assert torch.equal(half["encoder_attention_mask"], drawn["encoder_attention_mask"][part])
    difference = negative["encoder_hidden_states"] - positive["encoder_hidden_states"]
    assert difference.abs().amax(dim=(1, 2)).min() > 0.01
    assert highres or negative["encoder_hidden_states"][:, :5].abs().min() > 0  # the stored rows


def test_conditions_are_dropped_sample_by_sample():
    pipeline = build_pipeline(highres=True)
    loss = loss_of(pipeline)
    kept, mixed = (loss(**inputs(drop=drop))["per_sample"] for drop in (False, [False, True, False]))
    assert (kept != mixed).tolist() == [False, True, False]


def test_latents_are_what_the_pipeline_decodes():
    pipeline = build_pipeline()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    latents = encode_latents(pipeline.vae, pixels, noise)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        unscaled = posterior.mean + posterior.std * noise
        torch.testing.assert_close(pipeline.decode_latents(latents), pipeline.vae.decode(unscaled).sample)
    assert posterior.std.min() > 0 and not latents.requires_grad


def test_images_without_codes_are_counted():
    pipeline = build_pipeline()
    given = inputs() | {"codes": CODES[0], "num_tokens": torch.tensor([3, 0, 0])}
    output = loss_of(pipeline)(**given)
    assert output["without_codes"].item() == pytest.approx(2 / 3) and output["loss"].isfinite()


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ({"prediction_type": "epsilon"}, {}, "learns nothing. Use prediction_type 'v_prediction'"),
        ({}, {"snr_gamma": 5.0}, "Leave snr_gamma out"),
        ({**EPSILON, "prediction_type": "sample"}, {}, "one of epsilon, v_prediction; got 'sample'"),
        (EPSILON, {"snr_gamma": 0.0}, "snr_gamma must be positive; got 0.0"),
    ],
)
def test_schedules_that_cannot_be_trained(scheduler, options, message):
    pipeline = build_pipeline()
    config = DDIMScheduler.from_config({**pipeline.scheduler.config, **scheduler}).config
    with pytest.raises(ValueError, match=message):
        PixelDecoderLoss(pipeline.unet, pipeline.token_decoder, config, **options)
