"""What a pixel decoder refuses, before anything is computed."""

import math

import numpy as np
import pytest
import torch

from lavit_hf.pipelines.pipeline_lavit_pixel_decoder import ASPECT_RATIOS, codes_of_ids, resolve_size, split_images

OFFSET, CODES, END = 302, 64, 301


@pytest.fixture
def refuse(pipeline, monkeypatch):
    """Calls either pipeline, expecting an error before the token decoder runs."""
    monkeypatch.setattr(pipeline.token_decoder, "forward", lambda *_: pytest.fail("went on with bad input"))

    def call(error, match, *args, **options):
        with pytest.raises(error, match=match):
            pipeline(*args, **options)

    return call


@pytest.mark.parametrize(
    ("codes", "error", "match"),
    [
        ([torch.tensor([0, 64])], ValueError, "Image 0 has the code 64; codes go from 0 to 63"),
        ([torch.tensor([1]), torch.tensor([-1])], ValueError, "Image 1 has the code -1"),
        ([torch.arange(17)], ValueError, "17 codes; an image has at most 16"),
        ([], ValueError, "empty"),
        (torch.empty(0, 3, dtype=torch.long), ValueError, "empty"),
        ([torch.tensor([1.0])], TypeError, "float32"),
        ([torch.tensor([True])], TypeError, "bool"),
        ([[1.5]], TypeError, "float"),
        ([["one"]], TypeError, "codes\\[0\\].*integers"),
        ("one", TypeError, "list of 1-D"),
        (7, TypeError, "list of 1-D"),
        ([torch.zeros(2, 2, dtype=torch.long)], TypeError, "1-D"),
        ([[1, 2], None], TypeError, "codes\\[1\\]"),
    ],
)
def test_codes(refuse, codes, error, match):
    refuse(error, match, codes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 60}, "`height` must be a positive multiple of 8; got 60"),
        ({"width": 0}, "`width`.*got 0"),
        ({"height": -8}, "`height`.*got -8"),
        ({"height": 64.0}, "`height`.*got 64.0"),
        ({"aspect_ratio": "5:1"}, "one of 1:1, 4:3"),
        ({"aspect_ratio": "1:1", "width": 64}, "not both"),
        ({"num_inference_steps": 0}, "positive integer; got 0"),
        ({"num_inference_steps": -4}, "positive integer; got -4"),
        ({"num_inference_steps": 2.5}, "positive integer; got 2.5"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_images_per_prompt": 0}, "positive integer; got 0"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"guidance_scale": "7"}, "finite"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"\[1, 4, 8, 8\]; got \[1, 4, 8, 9\]"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"\[1, 4, 8, 8\]"),
        ({"latents": torch.full((1, 4, 8, 8), math.nan)}, "NaN"),
        ({"latents": torch.full((1, 4, 8, 8), math.inf)}, "infinity"),
        ({"input_ids": [[1]]}, "either `codes` or `input_ids`"),
    ],
)
def test_other_arguments(refuse, options, match):
    refuse(ValueError, match, [[1, 2]], **options)


def test_numpy_numbers(pipeline):
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    numbers = {name: (np.float32 if name == "guidance_scale" else np.int64)(value) for name, value in options.items()}
    drawn = [
        pipeline([[1, 2]], generator=torch.Generator().manual_seed(0), output_type="pt", **values).images
        for values in (options, numbers)
    ]
    assert len(drawn[0]) == 2 and torch.equal(*drawn)


@pytest.mark.parametrize("options", [{"height": np.int64(60)}, {"num_inference_steps": np.int64(0)}])
def test_wrong_numpy_numbers(refuse, options):
    refuse(ValueError, "positive", [[1, 2]], **options)


@pytest.mark.parametrize("latents", [torch.zeros(1, 4, 8, 8, dtype=torch.long), np.zeros((1, 4, 8, 8))])
def test_latents_that_are_no_floats(refuse, latents):
    refuse(TypeError, "tensor of floats", [[1]], latents=latents)


def test_neither_codes_nor_ids(refuse):
    refuse(ValueError, "either `codes` or `input_ids`")


def test_ids_without_knowing_the_vocabulary(pipeline):
    pipeline.register_to_config(visual_token_offset=None)
    with pytest.raises(ValueError, match="visual_token_offset"):
        pipeline(input_ids=[[302]])


@pytest.mark.parametrize(
    ("ids", "match"), [([367], "367; ids go from 0 to 366"), ([-100], "-100"), ([302, END, 303], "several images")]
)
def test_ids(refuse, ids, match):
    refuse(ValueError, match, input_ids=[[302], ids])


def test_ids_that_are_no_codes_are_dropped():
    rows = [[5, 6, 300, 302, 1, 300, 365, END, 2, 2], [302, 303], [END, 2], [366, 300, 310, END, 1, 0]]
    found = codes_of_ids([torch.tensor(row) for row in rows], OFFSET, CODES, END)
    assert [codes.tolist() for codes in found] == [[0, 63], [0, 1], [], [8]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1, 2], []], [[1, 2], []]),
        ([torch.tensor([1]), np.array([2, 3])], [[1], [2, 3]]),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([1, 2], [[1, 2]]),
        ((torch.tensor(1), torch.tensor(2)), [[1, 2]]),
    ],
)
def test_forms_of_codes(values, expected):
    found = split_images(values, "codes")
    assert [codes.tolist() for codes in found] == expected
    assert all(codes.dtype == torch.long for codes in found)


def test_published_sizes():
    sizes = {name: resolve_size(None, None, name, 1024, 8) for name in ASPECT_RATIOS}
    assert sizes == ASPECT_RATIOS
    assert sizes["16:9"] == (768, 1344) and resolve_size(None, None, None, 1024, 8) == (1024, 1024)


def test_sizes_of_other_decoders_keep_shape_and_area():
    assert resolve_size(None, None, "16:9", 512, 8) == (384, 672)
    assert resolve_size(None, None, "1:1", 512, 8) == (512, 512)
    assert resolve_size(None, 64, None, 512, 8) == (512, 64)
