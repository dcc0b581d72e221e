"""Codes that the bundled checkpoint draws, recorded before transformers ran the decoding loop."""

import pytest
import torch

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint

TEXTS = ["a red square", "two blue circles left of a green triangle"]
# How to draw, and the first codes of every sequence.
RECORDED = {
    "unguided greedy": [[803, 803, 510, 510, -1, -433], [22, 22, 22, 22, 796, 738]],
    "guided greedy": [[803, 418, 465, -1, -433, -433], [807, 910, 671, 671, 910, 781]],
    "guided greedy static": [[803, 418, 465, -1, -433, -433], [807, 910, 671, 671, 910, 781]],
    "guided penalties": [[803, 418, 465, -1, -433, -433], [807, 910, 671, 671, 873, 548]],
    "guided negative": [[489, 489, 489, 532, 532, 532], [72, 72, 72, 72, 813, 836]],
    "guided one generator": [[803, 418, 465, -1, -433, -433], [698, 233, 233, 233, 110, 559]],
    "guided generators each": [
        [803, 418, -1, -433, -433, -433],
        [934, 527, 527, 510, 427, 427],
        [22, 22, 22, 22, 863, 807],
        [698, 486, 486, 486, 847, 932],
    ],
    "unguided each": [
        [500, 888, 888, 888, 888, 818],
        [527, 527, 527, 527, 31, 31],
        [543, 953, 647, 647, 593, 593],
        [351, 894, 894, 674, 894, 894],
    ],
    "guided each static": [
        [803, 418, -1, -433, -433, -433],
        [934, 527, 527, 510, 427, 427],
        [22, 22, 22, 22, 863, 807],
        [698, 486, 486, 486, 847, 932],
    ],
    "interleaved guided each": [
        [-1, -368, -104, -133, -19, -150],
        [-1, -21, -156, -150, -104, -82],
        [22, 22, 22, 22, 863, 807],
        [698, 486, 486, 486, 847, 932],
    ],
}


@pytest.fixture(scope="module")
def scenes():
    path = default_checkpoint()
    model = LavitForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model, ImageTextProcessor.from_pretrained(path)


def options_of(name: str, processor: ImageTextProcessor) -> dict:
    """Options of a case, by the words of its name."""
    words, options = name.split(), {"guidance_scale": 4.0}
    if "unguided" in words:
        options = {}
    if "static" in words:
        options["cache_implementation"] = "static"
    if "penalties" in words:
        options |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    if "negative" in words:
        negative = processor(text="a blue circle", generation_mode="image", return_tensors="pt")
        options["negative_prompt_ids"] = negative["input_ids"]
    if "one" in words:
        options |= {"do_sample": True, "generator": torch.Generator().manual_seed(0)}
    if "each" in words:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        options |= {"do_sample": True, "generator": generators, "num_return_sequences": 2}
    return options


@pytest.mark.parametrize("name", RECORDED)
def test_codes_are_those_recorded(scenes, name):
    model, processor = scenes
    mode = "interleaved" if "interleaved" in name else "image"
    inputs = processor(text=TEXTS, generation_mode="image", padding=True, return_tensors="pt")
    drawn = model.generate(**inputs, generation_mode=mode, max_new_tokens=6, **options_of(name, processor))
    codes = drawn[:, inputs["input_ids"].shape[1] :] - model.config.visual_token_offset
    assert codes.tolist() == RECORDED[name]
