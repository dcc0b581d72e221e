"""From codes to pixels with the numbers of the original implementation."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

GUIDANCE = {"highres": 7.0, "lowres": 5.0}


@pytest.fixture(params=["highres", "lowres"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def draw(kind, request, golden, codes):
    """Draws the recorded images with the recorded settings."""
    pipeline = request.getfixturevalue(kind)

    def call(**options):
        return pipeline(
            codes,
            latents=golden[f"{kind}_init_latents"],
            num_inference_steps=4,
            guidance_scale=GUIDANCE[kind],
            **options,
        ).images

    return call


def _record_unet(pipeline) -> list[dict]:
    """What the U-Net is given and returns, per step."""
    calls: list[dict] = []
    forward = pipeline.unet.forward

    def recorded(sample, timestep, **options):
        output = forward(sample, timestep, **options)
        calls.append({"sample": sample, "timestep": timestep, "noise": output[0], **options})
        return output

    pipeline.unet.forward = recorded
    return calls


def test_unet_is_given_and_returns_what_was_recorded(kind, draw, golden, request):
    calls = _record_unet(request.getfixturevalue(kind))
    draw(output_type="latent")
    first = calls[0]
    assert [call["timestep"].item() for call in calls] == golden[f"{kind}_timesteps"].tolist()
    torch.testing.assert_close(first["noise"], golden[f"{kind}_noise_pred_step0"], atol=5e-5, rtol=0)
    if kind == "lowres":
        expected = golden["lowres_encoder_hidden_states"]
        torch.testing.assert_close(first["encoder_hidden_states"], expected, atol=5e-5, rtol=0)
        assert torch.equal(first["encoder_attention_mask"].long(), golden["lowres_encoder_attention_mask"])
        return
    negative, positive = first["encoder_hidden_states"].chunk(2)
    assert not negative.any() and "encoder_attention_mask" not in first
    torch.testing.assert_close(positive, golden["highres_prompt_embeds"], atol=5e-5, rtol=0)
    added = first["added_cond_kwargs"]
    negative, positive = added["text_embeds"].chunk(2)
    assert not negative.any()
    torch.testing.assert_close(positive, golden["highres_pooled"], atol=5e-5, rtol=0)
    assert torch.equal(added["time_ids"], golden["highres_time_ids"])


def test_final_latents(kind, draw, golden):
    torch.testing.assert_close(draw(output_type="latent"), golden[f"{kind}_final_latents"], atol=5e-4, rtol=0)


def test_images(kind, draw, golden):
    expected = (golden[f"{kind}_decoded_raw"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(output_type="pt"), expected, atol=1e-3, rtol=0)
    pictures = np.stack([np.asarray(image) for image in draw()])
    difference = np.abs(pictures.astype(int) - golden[f"{kind}_image_uint8"].numpy().astype(int))
    assert difference.max() <= 1


def test_reconstruction(highres, model, golden):
    visual_tokenizer = model.visual_tokenizer
    side = visual_tokenizer.config.image_size[0]
    pictures = F.interpolate(golden["detok_input"], (side, side), mode="bicubic", align_corners=False)
    mean, std = golden_statistics()
    pixel_values = (pictures - mean) / std
    torch.testing.assert_close(pixel_values, golden["detok_pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        output = visual_tokenizer.encode(pixel_values)
    assert torch.equal(output.keep_mask.float(), golden["detok_keep_mask"])
    images = highres(
        list(output.codes.split(output.num_tokens.tolist())),
        latents=golden["detok_init_latents"],
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(images, golden["detok_image"], atol=1e-3, rtol=0)


def golden_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return tuple(torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
