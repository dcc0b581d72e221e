"""Codes of the next batch are written while the pixels of the last are drawn."""

import copy
import threading
import time

import numpy as np
import pytest
import torch

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from lavit_hf.pipelines import pipeline_lavit_text_to_image as module
from lavit_hf.pipelines.overlap import can_overlap, write_and_draw
from tiny_pixel_decoders import seeded

PROMPTS = ["a red bird", "two dogs on the grass", "cat"]
FAST = {"num_inference_steps": 2, "output_type": "np"}
CPU = torch.device("cpu")  # a thread is all that differs from the usual order


@pytest.fixture
def pipeline(loaded_text_to_image):
    return copy.copy(loaded_text_to_image)


def codes_of(output) -> list[list[int]]:
    return [codes.tolist() for codes in output.codes]


def test_batches_are_calls_of_their_prompts(pipeline):
    negative, bias = ["blue", "cats and dogs", ""], [0.5, -0.5, 0.0]
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    options = {**FAST, "num_images_per_prompt": 2}
    every = {"negative_prompt": negative, "image_end_bias": bias, "latents": latents}
    whole = pipeline(PROMPTS, batch_size=2, generator=seeded(*range(6)), **every, **options)
    assert len(whole.images) == len(whole.codes) == 6 and whole.nsfw_content_detected is None
    for prompts, drawn in ((slice(0, 2), slice(0, 4)), (slice(2, 3), slice(4, 6))):
        own = {"negative_prompt": negative[prompts], "image_end_bias": bias[prompts], "latents": latents[drawn]}
        part = pipeline(PROMPTS[prompts], generator=seeded(*range(6)[drawn]), **own, **options)
        assert np.array_equal(part.images, whole.images[drawn]) and codes_of(part) == codes_of(whole)[drawn]


@pytest.mark.parametrize(("output_type", "kind"), [("pil", list), ("pt", torch.Tensor), ("latent", torch.Tensor)])
def test_batches_become_one_output(pipeline, output_type, kind):
    options = {"num_inference_steps": 1, "output_type": output_type, "return_dict": False}
    images, codes, flagged = pipeline(PROMPTS, batch_size=2, negative_prompt="blue", **options)
    assert isinstance(images, kind) and len(images) == len(codes) == 3 and flagged is None


@pytest.mark.parametrize("is_inference", [False, True])
def test_the_same_bits_with_overlap(pipeline, monkeypatch, is_inference):
    """Drawing waits for the writing of the next batch, which would hang if one came after the other."""
    with torch.inference_mode(is_inference):
        alone = pipeline(PROMPTS, batch_size=1, generator=seeded(0, 1, 2), **FAST)
    write, draw = LavitTextToImagePipeline.generate_codes, LavitPixelDecoderPipeline.__call__
    writers, drawers, modes, two_written = [], [], [], threading.Event()

    def watched_write(self, *args, **kwargs):
        codes = write(self, *args, **kwargs)
        writers.append(threading.current_thread())
        if len(writers) == 2:
            two_written.set()
        return codes

    def watched_draw(self, *args, **kwargs):
        assert two_written.wait(60)
        drawers.append(threading.current_thread())
        modes.append(torch.is_inference_mode_enabled())
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(LavitTextToImagePipeline, "generate_codes", watched_write)
    monkeypatch.setattr(LavitPixelDecoderPipeline, "__call__", watched_draw)
    monkeypatch.setattr(module, "can_overlap", lambda *parts: True)  # as on a GPU
    with torch.inference_mode(is_inference):
        both = pipeline(PROMPTS, batch_size=1, generator=seeded(0, 1, 2), **FAST)
    assert set(writers) == {threading.current_thread()} and len(set(drawers)) == 1 and drawers[0] not in writers
    assert modes == [is_inference] * 3
    assert np.array_equal(both.images, alone.images) and codes_of(both) == codes_of(alone)


@pytest.mark.parametrize(
    "why", [None, "one generator", "one of them twice", "no generator", "callback", "graphs", "one batch"]
)
def test_what_is_not_independent_keeps_its_order(pipeline, monkeypatch, why):
    places = []
    monkeypatch.setattr(module, "can_overlap", lambda *parts: True)
    monkeypatch.setattr(
        module,
        "write_and_draw",
        lambda batches, write, draw, place: places.append(place) or write_and_draw(batches, write, draw),
    )
    generators = seeded(0, 1, 2)
    options = {
        "one generator": {"generator": generators[0]},
        "one of them twice": {"generator": [*generators[:2], generators[0]]},
        "no generator": {"generator": None},
        "callback": {"callback_on_step_end": lambda pipeline, step, timestep, tensors: tensors},
        "one batch": {"batch_size": 3},
    }.get(why, {})
    if why == "graphs":
        pipeline.unet = copy.deepcopy(pipeline.unet)
        pipeline.unet.compile(backend="eager")
    pipeline(PROMPTS, **{"batch_size": 2, "generator": generators, "num_inference_steps": 1, **options})
    assert places == [CPU if why is None else None]


def test_a_cpu_has_no_room_for_both(pipeline):
    assert not can_overlap(pipeline.model, pipeline.unet)


@pytest.mark.parametrize("place", [None, CPU])
@pytest.mark.parametrize("half", ["write", "draw"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_errors_reach_the_caller(place, half, number):
    done = {"write": [], "draw": []}
    before = set(threading.enumerate())

    def work(name, batch):
        if name == half and batch == number:
            raise KeyError(f"{name} {batch}")
        time.sleep(0.01)
        done[name].append(batch)
        return batch

    with pytest.raises(KeyError, match=f"{half} {number}"):
        write_and_draw(range(4), lambda batch: work("write", batch), lambda batch: work("draw", batch), place)
    assert done["draw"] == list(range(number))
    assert len(done["write"]) <= number + 2  # no more than the next batch was begun
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("place", [None, CPU])
def test_order(place):
    assert write_and_draw(range(5), lambda batch: batch + 1, lambda written: written * 10, place) == [
        10,
        20,
        30,
        40,
        50,
    ]
    assert write_and_draw([], None, None, place) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer; got 0"),
        ({"batch_size": True}, "`batch_size` must be a positive integer"),
        ({"batch_size": 1.5}, "`batch_size` must be a positive integer"),
        ({"batch_size": 2, "negative_prompt": ["red", "blue"]}, "Got 2 values of `negative_prompt` for 3 prompts"),
        ({"batch_size": 2, "image_end_bias": [1.0] * 4}, "Got 4 values of `image_end_bias` for 3 prompts"),
    ],
)
def test_bad_batches(pipeline, monkeypatch, options, message):
    def never(*args, **kwargs):
        raise AssertionError("the language model has been asked")

    monkeypatch.setattr(pipeline.model, "generate", never)
    with pytest.raises(ValueError, match=message):
        pipeline(PROMPTS, **options)
