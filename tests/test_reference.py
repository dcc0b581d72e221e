"""The original's recorded answers through the public API, from PNG files to ids."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.fixture(params=["attached", "light"])
def processor(request, attached_processor, light_processor):
    """The processor in both forms."""
    return {"attached": attached_processor, "light": light_processor}[request.param]


def prompts(golden_meta: dict, kind: str) -> list[str]:
    if kind == "caption":
        return ["<image>"] * 3
    if kind == "prompted caption":
        return [f"<image>{prompt}" for prompt in golden_meta["caption_prompts"]]
    return [f"<image>Question: {question} Answer:" for question in golden_meta["questions"]]


CAPTION = {"min_new_tokens": 8, "max_new_tokens": 12}
VQA = {"min_new_tokens": 2, "max_new_tokens": 10, "length_penalty": 0.0}


@pytest.mark.parametrize(
    ("recorded", "kind", "options"),
    [
        ("caption_greedy_ids", "caption", {**CAPTION, "num_beams": 1}),
        ("caption_beam2_ids", "caption", {**CAPTION, "num_beams": 2, "length_penalty": 1.0}),
        ("caption_prompt_greedy_ids", "prompted caption", {**CAPTION, "num_beams": 1}),
        ("vqa_greedy_ids", "question", {**VQA, "num_beams": 1}),
        ("vqa_beam5_ids", "question", {**VQA, "num_beams": 5, "early_stopping": True}),
    ],
)
def test_generated_ids(model, processor, images, golden, golden_meta, recorded, kind, options):
    inputs = processor(images=images, text=prompts(golden_meta, kind), padding=True, return_tensors="pt")
    output = model.generate(**inputs, **options)
    prompt_length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :prompt_length], inputs["input_ids"])
    new = output[:, prompt_length:]
    expected = golden[recorded]
    assert torch.equal(nn.functional.pad(new, (0, expected.shape[1] - new.shape[1]), value=2), expected)


def test_logits(model, processor, images, golden, golden_meta):
    inputs = processor(images=images, text=prompts(golden_meta, "question"), padding=True, return_tensors="pt")
    logits = model(**inputs).logits
    for row, expected, count in zip(logits, golden["vqa_logits"], golden["vqa_prompt_text_mask"].sum(-1), strict=True):
        torch.testing.assert_close(row[-count:], expected[-count:], atol=1e-4, rtol=0)


def test_discrete_ids(light_processor, images, golden):
    ids = torch.cat([torch.as_tensor(one) for one in light_processor.tokenize_images(images)])
    assert torch.equal(ids, golden["disc_llm_ids_with_special"])


def test_from_files_by_auto_classes_alone(checkpoint: Path, original_dir: Path, golden):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    pictures = [Image.open(original_dir / "images" / f"{index}.png") for index in range(3)]
    inputs = processor(images=pictures, text=["<image>"] * 3, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], golden["pixel_values"], atol=1e-5, rtol=0)
    output = model.generate(**inputs, **CAPTION)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], golden["caption_greedy_ids"])


def test_the_encoder_runs_once_for_processor_and_model_together(model, attached_processor, images):
    calls = []
    model.visual_tokenizer.vision_model.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    inputs = attached_processor(images=images, text=["<image>"] * 3, padding=True, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, num_beams=2)
    model(**inputs)
    assert calls == [3]
