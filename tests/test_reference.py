"""The original's recorded answers through the public API, from PNG files to ids."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor


def as_features(model, inputs):
    """The same prompts with one placeholder per kept patch and their features, which the model takes as well."""
    tokens = model.visual_tokenizer.embed(inputs["pixel_values"])
    width = inputs["input_ids"].shape[1] - model.visual_tokenizer.config.num_patches + int(tokens.num_tokens.max())
    rows = {"input_ids": [], "attention_mask": []}
    for ids, mask, count in zip(inputs["input_ids"], inputs["attention_mask"], tokens.num_tokens, strict=True):
        is_image = ids == model.config.image_token_id
        kept = (mask == 1) & ~(is_image & (is_image.cumsum(0) > count))
        padding = (width - int(kept.sum()), 0)
        rows["input_ids"].append(nn.functional.pad(ids[kept], padding, value=2))
        rows["attention_mask"].append(nn.functional.pad(mask[kept], padding))
    return {**{name: torch.stack(row) for name, row in rows.items()}, "image_features": tokens.features}


@pytest.fixture(params=["attached", "light"])
def prepare(request, model, processor, images, golden_meta):
    """Prepares prompts of a kind in either form that the model takes."""

    def prepare(kind: str) -> dict:
        inputs = processor(images=images, text=prompts(golden_meta, kind), padding=True, return_tensors="pt")
        return as_features(model, inputs) if request.param == "attached" else inputs

    return prepare


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
def test_generated_ids(model, prepare, golden, recorded, kind, options):
    inputs = prepare(kind)
    output = model.generate(**inputs, **options)
    prompt_length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :prompt_length], inputs["input_ids"])
    new = output[:, prompt_length:]
    expected = golden[recorded]
    assert torch.equal(nn.functional.pad(new, (0, expected.shape[1] - new.shape[1]), value=2), expected)


def test_logits(model, prepare, golden):
    logits = model(**prepare("question")).logits
    for row, expected, count in zip(logits, golden["vqa_logits"], golden["vqa_prompt_text_mask"].sum(-1), strict=True):
        torch.testing.assert_close(row[-count:], expected[-count:], atol=1e-4, rtol=0)


def test_attention_mask(model, prepare, golden):
    """`generate` goes on from the recorded mask, behind nothing but padding."""
    masks = []
    model.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    model.generate(**prepare("question"), max_new_tokens=1)
    (mask,) = masks
    expected = golden["vqa_attention_mask"]
    width = min(mask.shape[1], expected.shape[1])
    assert torch.equal(mask[:, -width:], expected[:, -width:])
    assert not mask[:, :-width].any() and not expected[:, :-width].any()


def test_discrete_ids(processor, images, golden):
    ids = torch.cat([torch.as_tensor(one) for one in processor.tokenize_images(images)])
    assert torch.equal(ids, golden["disc_llm_ids_with_special"])


def test_from_files_by_auto_classes_alone(checkpoint: Path, original_dir: Path, golden):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    pictures = [Image.open(original_dir / "images" / f"{index}.png") for index in range(3)]
    inputs = processor(images=pictures, text=["<image>"] * 3, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], golden["pixel_values"], atol=1e-5, rtol=0)
    output = model.generate(**inputs, **CAPTION)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], golden["caption_greedy_ids"])


def test_the_encoder_runs_once_for_processor_and_model_together(checkpoint, model, images):
    calls = []
    model.visual_tokenizer.vision_model.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    processor = AutoProcessor.from_pretrained(checkpoint, visual_tokenizer=model)
    inputs = processor(images=images, text=["<image>"] * 3, padding=True, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert calls == [3]
