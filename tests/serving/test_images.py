"""`/v1/images/generations`: what the official client gets is what the pipeline draws."""

import concurrent.futures

import pytest
import torch

from .conftest import NAME, open_base64

STEPS = {"num_inference_steps": 3}


def draw(client, prompt="a cat", extra_body=None, **options):
    return client.images.generate(model=NAME, prompt=prompt, extra_body={**STEPS, **(extra_body or {})}, **options)


def drawn(pipeline, prompt="a cat", seed=0, **options):
    generator = [torch.Generator().manual_seed(seed)]
    return pipeline(prompt, generator=generator, **{**STEPS, **options}).images[0]


def first(answer):
    return open_base64(answer.data[0].b64_json)


def test_picture(client, pipeline) -> None:
    answer = draw(client, extra_body={"seed": 7})
    assert first(answer).tobytes() == drawn(pipeline, seed=7).tobytes()
    assert answer.size == "64x64" and answer.output_format == "png" and answer.data[0].seed == 7
    prompt = pipeline.processor(text="a cat", generation_mode="image")["input_ids"][0]
    assert answer.usage.input_tokens == len(prompt)
    assert 1 <= answer.usage.output_tokens <= 17
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        (
            {"guidance_scale": 2.5, "negative_prompt": "a very red dog"},
            {"guidance_scale": 2.5, "negative_prompt": "a very red dog"},
        ),
        ({"size": "96x64"}, {"width": 96, "height": 64}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"top_k": 5, "temperature": 0.7}, {"top_k": 5, "temperature": 0.7}),
        ({"min_drawn_tokens": 4, "max_drawn_tokens": 4}, {"min_new_tokens": 4, "max_new_tokens": 4}),
        ({"decoder_guidance_scale": 2.0}, {"decoder_guidance_scale": 2.0}),
    ],
)
def test_options(client, pipeline, given: dict, options: dict) -> None:
    assert (
        first(draw(client, extra_body={"seed": 3, **given})).tobytes() == drawn(pipeline, seed=3, **options).tobytes()
    )


def test_several_have_seeds_of_their_own(client, pipeline) -> None:
    answer = draw(client, n=3, extra_body={"seed": 11})
    assert [one.seed for one in answer.data] == [11, 12, 13]
    for one in answer.data:
        again = drawn(pipeline, seed=one.seed)
        assert open_base64(one.b64_json).size == again.size
        difference = torch.tensor(list(open_base64(one.b64_json).tobytes())) - torch.tensor(list(again.tobytes()))
        assert difference.abs().max() <= 2  # batches round otherwise
    seeds = {draw(client).data[0].seed for _ in range(2)}
    assert len(seeds) == 2  # without one, each has its own


def test_codes_do_not_depend_on_the_batch(server, client) -> None:
    alone = [
        draw(client, prompt, extra_body={"seed": seed}) for seed, prompt in enumerate(["a", "a big red dog", "b"])
    ]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(
                lambda at: draw(client, at[1], extra_body={"seed": at[0]}), enumerate(["a", "a big red dog", "b"])
            )
        )
    for one, other in zip(alone, together, strict=True):
        assert one.usage == other.usage
        difference = torch.tensor(list(first(one).tobytes())) - torch.tensor(list(first(other).tobytes()))
        assert difference.abs().max() <= 2


@pytest.mark.parametrize("number", [0, 2])
def test_progress(client, number: int) -> None:
    options = {"extra_body": {"seed": 7, "num_inference_steps": 4}}
    events = list(draw(client, stream=True, partial_images=number, **options))
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * number
    assert [event.partial_image_index for event in partial] == list(range(number))
    assert all(open_base64(event.b64_json).size == (64, 64) for event in events)
    assert last.type == "image_generation.completed"
    whole = draw(client, **options)
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert open_base64(last.b64_json).tobytes() == first(whole).tobytes()
    assert len({event.b64_json for event in events}) == number + 1


@pytest.mark.parametrize(("output_format", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, output_format: str, name: str) -> None:
    assert first(draw(client, output_format=output_format)).format == name
