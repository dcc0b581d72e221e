"""Tokens of images."""

import numpy as np
import pytest

from lavit_hf.evaluation.data.scenes import read_scenes
from lavit_hf.evaluation.tokens import measure_tokens, object_area, tokenize


def test_tokens_are_those_of_both_branches(evaluated):
    images = [sample.open_image() for sample in read_scenes("caption", None, 4).samples]
    found = tokenize(evaluated.model, evaluated.processor, images)
    pixel_values = evaluated.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    visual_tokenizer = evaluated.model.visual_tokenizer
    discrete, continuous = visual_tokenizer.encode(pixel_values), visual_tokenizer.embed(pixel_values)
    assert [code for of_image in found for code in of_image["codes"]] == discrete.codes.tolist()
    assert [of_image["num_tokens"]["discrete"] for of_image in found] == discrete.num_tokens.tolist()
    assert [of_image["num_tokens"]["continuous"] for of_image in found] == continuous.num_tokens.tolist()
    for image, together in zip(images, found, strict=True):
        assert tokenize(evaluated.model, evaluated.processor, [image]) == [together]


def test_numbers_of_tokens_are_related_to_what_is_there():
    samples = read_scenes("caption", None, 30).samples
    from lavit_hf.data.scenes import Scene

    areas = [object_area(Scene.from_dict(sample.meta["scene"])) for sample in samples]
    noise = np.random.default_rng(0).permutation(30).tolist()
    records = [
        {"meta": sample.meta, "codes": [number % 3], "num_tokens": {"discrete": round(area), "continuous": other}}
        for number, (sample, area, other) in enumerate(zip(samples, areas, noise, strict=True))
    ]
    found = measure_tokens(records, codebook_size=6)
    assert found["tokens/discrete/r_with_object_area"].value == pytest.approx(1, abs=1e-4)
    assert abs(found["tokens/continuous/r_with_object_area"].value) < 0.4
    assert found["tokens/continuous/mean"].value == pytest.approx(np.mean(noise))
    assert found["tokens/continuous/std"].value == pytest.approx(np.std(noise))
    assert (found["live_codes"].value, found["live_codes"].n) == (0.5, 6)


def test_photographs_have_no_objects_to_compare_with():
    found = measure_tokens([{"meta": {}, "codes": [1], "num_tokens": {"discrete": 1, "continuous": 2}}], 4)
    assert "tokens/discrete/r_with_object_area" not in found and found["live_codes"].value == 0.25
