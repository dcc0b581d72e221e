"""The original's recorded numbers, in every dtype: exact in fp32, and close in 16 bits."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from lavit_hf import LavitTokenDecoder
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from test_reference import CAPTION, VQA, prompts

# Norm of the error over that of what was recorded. On a CPU it is 0.004 and 0.03 after four denoising steps.
ERRORS = {torch.float16: 0.02, torch.bfloat16: 0.2}
# Shares that are as recorded: where two things are nearly as likely, rounding decides. A CPU keeps one of 96 patches
# otherwise in bf16, and a search with beams goes another way from there on.
PATCHES = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 0.95}
CODES = {torch.float32: 1.0, torch.float16: 0.95, torch.bfloat16: 0.8}
IDS = {torch.float32: 1.0, torch.float16: 0.7, torch.bfloat16: 0.4}
GUIDANCE = {"highres": 7.0, "lowres": 5.0}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """As on a CPU in fp32, and as exact as 16 bits are."""
    actual = actual.float().cpu()
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    assert (actual - expected).norm() <= ERRORS.get(dtype, 1.0) * expected.norm()


def share_of_equal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    width = min(actual.shape[-1], expected.shape[-1])
    return (actual.cpu()[..., :width] == expected[..., :width]).double().mean().item()


def test_masks_are_those_of_the_recording(rounded, golden, device, dtype):
    pixels = golden["pixel_values"].to(device, dtype)
    tokenizer = rounded.visual_tokenizer
    for name, output in (("disc", tokenizer.encode(pixels)), ("cont", tokenizer.embed(pixels))):
        assert share_of_equal(output.keep_mask, golden[f"{name}_keep_mask"].bool()) >= PATCHES[dtype]
        assert output.selector_log_probs.dtype == torch.float32


def test_model_and_processor_keep_the_same_patches(rounded, checkpoint, images):
    """In every dtype; in fp32 also one by one."""
    processor = AutoProcessor.from_pretrained(checkpoint, visual_tokenizer=rounded)
    together = processor.tokenize_images(images)
    pixels = processor(images=images, text=["<image>"] * 3, padding=True, return_tensors="pt")["pixel_values"]
    output = rounded.visual_tokenizer.encode(pixels.to(rounded.device, rounded.dtype))
    assert [len(ids) - 2 for ids in together] == output.num_tokens.tolist()
    if rounded.dtype == torch.float32:
        assert [len(processor.tokenize_images([image])[0]) for image in images] == [len(ids) for ids in together]
    codes = torch.cat([torch.as_tensor(ids)[1:-1] for ids in together]) - rounded.config.visual_token_offset
    assert torch.equal(codes.cpu(), output.codes.cpu())


def test_codes(rounded, golden, device, dtype):
    codes = rounded.visual_tokenizer.encode(golden["pixel_values"].to(device, dtype)).codes
    assert share_of_equal(codes, golden["disc_code_ids"]) >= CODES[dtype]


@torch.no_grad()
def test_logits(rounded, prepare, golden, golden_meta, dtype):
    logits = rounded(**prepare(prompts(golden_meta, "question"))).logits.float().cpu()
    for row, expected, count in zip(logits, golden["vqa_logits"], golden["vqa_prompt_text_mask"].sum(-1), strict=True):
        assert_close(row[-count:], expected[-count:], dtype, 1e-4)


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
    assert_close(found, golden[condition], dtype, 5e-5)


@pytest.mark.parametrize("kind", ["highres", "lowres"])
def test_pixels(checkpoint, golden, device, dtype, kind):
    pipeline = LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=kind, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    codes = list(golden["dec_codes"].split(golden["dec_counts"].tolist()))
    options = {"num_inference_steps": 4, "guidance_scale": GUIDANCE[kind]}
    noise = golden[f"{kind}_init_latents"]
    latents = pipeline(codes, latents=noise.to(device, dtype), output_type="latent", **options).images
    assert_close(latents, golden[f"{kind}_final_latents"], dtype, 5e-4)
    if dtype == torch.float32:
        pictures = pipeline(codes, latents=noise.to(device), **options).images
        difference = (
            np.stack([np.asarray(one) for one in pictures]).astype(int) - golden[f"{kind}_image_uint8"].numpy()
        )
        assert np.abs(difference).max() <= 1
