"""The original's recorded numbers, in every dtype: exact in fp32, and close in 16 bits."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from lavit_hf import LavitTokenDecoder
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from test_reference import CAPTION, VQA, prompts

LOGITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
CONDITIONS = {torch.float32: 5e-5, torch.float16: 0.01, torch.bfloat16: 0.1}
LATENTS = {torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
# Shares of ids that are as recorded: where two are nearly as likely, rounding decides.
CODES = {torch.float32: 1.0, torch.float16: 0.95, torch.bfloat16: 0.8}
IDS = {torch.float32: 1.0, torch.float16: 0.9, torch.bfloat16: 0.5}
GUIDANCE = {"highres": 7.0, "lowres": 5.0}


def share_of_equal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    width = min(actual.shape[-1], expected.shape[-1])
    return (actual.cpu()[..., :width] == expected[..., :width]).double().mean().item()


def test_masks_are_the_same_everywhere(rounded, checkpoint, images, golden, device, dtype):
    """Model and processor, whose visual tokenizer may be on the CPU and in fp32, keep the same patches."""
    pixels = golden["pixel_values"].to(device, dtype)
    tokenizer = rounded.visual_tokenizer
    for name, output in (("disc", tokenizer.encode(pixels)), ("cont", tokenizer.embed(pixels))):
        assert torch.equal(output.keep_mask.cpu(), golden[f"{name}_keep_mask"].bool())
    on_device = AutoProcessor.from_pretrained(checkpoint, visual_tokenizer=rounded)
    on_cpu = AutoProcessor.from_pretrained(checkpoint)
    lengths = [[len(ids) for ids in processor.tokenize_images(images)] for processor in (on_device, on_cpu)]
    assert lengths[0] == lengths[1] == [count + 2 for count in golden["disc_counts"].tolist()]


def test_codes(rounded, golden, device, dtype):
    codes = rounded.visual_tokenizer.encode(golden["pixel_values"].to(device, dtype)).codes
    assert share_of_equal(codes, golden["disc_code_ids"]) >= CODES[dtype]


@torch.no_grad()
def test_logits(rounded, prepare, golden, golden_meta, dtype):
    logits = rounded(**prepare(prompts(golden_meta, "question"))).logits.float().cpu()
    for row, expected, count in zip(logits, golden["vqa_logits"], golden["vqa_prompt_text_mask"].sum(-1), strict=True):
        torch.testing.assert_close(row[-count:], expected[-count:], atol=LOGITS[dtype], rtol=0)


@pytest.mark.parametrize(
    ("recorded", "kind", "options"),
    [
        ("caption_greedy_ids", "caption", {**CAPTION, "num_beams": 1}),
        ("vqa_greedy_ids", "question", {**VQA, "num_beams": 1}),
        ("vqa_beam5_ids", "question", {**VQA, "num_beams": 5, "early_stopping": True}),
    ],
)
def test_generated_ids(rounded, prepare, golden, golden_meta, dtype, recorded, kind, options):
    inputs = prepare(prompts(golden_meta, kind))
    new = rounded.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert share_of_equal(new, golden[recorded]) >= IDS[dtype]


@pytest.mark.parametrize(
    ("folder", "condition"),
    [("token_decoder", "highres_prompt_embeds"), ("lowres/token_decoder", "lowres_unet_cond")],
)
@torch.no_grad()
def test_token_decoders(checkpoint, golden, device, dtype, folder, condition):
    decoder = LavitTokenDecoder.from_pretrained(checkpoint, subfolder=folder, dtype=dtype).to(device)
    found = decoder(golden["dec_codes"].to(device), golden["dec_counts"].tolist()).condition
    torch.testing.assert_close(found.float().cpu(), golden[condition], atol=CONDITIONS[dtype], rtol=0)


@pytest.mark.parametrize("kind", ["highres", "lowres"])
def test_pixels(checkpoint, golden, device, dtype, kind):
    pipeline = LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=kind, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    codes = list(golden["dec_codes"].split(golden["dec_counts"].tolist()))
    options = {"num_inference_steps": 4, "guidance_scale": GUIDANCE[kind]}
    noise = golden[f"{kind}_init_latents"]
    latents = pipeline(codes, latents=noise.to(device, dtype), output_type="latent", **options).images
    torch.testing.assert_close(latents.float().cpu(), golden[f"{kind}_final_latents"], atol=LATENTS[dtype], rtol=0)
    if dtype == torch.float32:
        pictures = pipeline(codes, latents=noise.to(device), **options).images
        difference = (
            np.stack([np.asarray(one) for one in pictures]).astype(int) - golden[f"{kind}_image_uint8"].numpy()
        )
        assert np.abs(difference).max() <= 1
