"""`generate` on a GPU: caches, compiled steps and generators change no id."""

import pytest
import torch
from transformers import CompileConfig

from lavit_hf.pipelines import LavitTextToImagePipeline
from test_reference import CAPTION, prompts

CACHES = ("dynamic", "static", "offloaded", "offloaded_static")
DRAWING = {"generation_mode": "image", "guidance_scale": 3.0, "min_new_tokens": 6, "max_new_tokens": 8}


@pytest.fixture
def inputs(prepare, golden_meta):
    return prepare(prompts(golden_meta, "caption"))


@pytest.fixture
def drawing(exact, recorded_processor, device):
    """Ids of two prompts to draw from, of different lengths."""
    texts = ["a red circle", "two green squares on a table"]
    return recorded_processor(text=texts, generation_mode="image", padding=True, return_tensors="pt").to(device)


def compile_config(device: torch.device) -> CompileConfig:
    """How transformers compiles on a GPU by itself; a CPU is told to, without a compiler of C++."""
    if device.type == "cuda":
        return CompileConfig()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("cache", CACHES)
def test_captions_from_every_cache(exact, inputs, golden, cuda, cache):
    output = exact.generate(**inputs, **CAPTION, num_beams=1, cache_implementation=cache)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :].cpu(), golden["caption_greedy_ids"])


def test_captions_by_default_and_again(exact, inputs, golden):
    """A second call may find what the first one kept."""
    for _ in range(3):
        output = exact.generate(**inputs, **CAPTION, num_beams=1)
        assert torch.equal(output[:, inputs["input_ids"].shape[1] :].cpu(), golden["caption_greedy_ids"])


def test_compiled_steps(model, inputs, drawing, golden, device):
    static = {"cache_implementation": "static", "compile_config": compile_config(device)}
    output = model.generate(**inputs, **CAPTION, num_beams=1, **static)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :].cpu(), golden["caption_greedy_ids"])
    expected = model.generate(**drawing, **DRAWING, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(model.generate(**drawing, **DRAWING, do_sample=False, **static), expected)


def test_drawing_by_default(exact, drawing):
    """Prompts of other lengths, and fewer of them, draw the same as without anything compiled."""
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2), slice(0, 2)):
        given = {name: tensor[rows] for name, tensor in drawing.items()}
        expected = exact.generate(**given, **DRAWING, do_sample=False, cache_implementation="dynamic")
        assert torch.equal(exact.generate(**given, **DRAWING, do_sample=False), expected)


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_generators(exact, drawing, device, place):
    """A row draws by its own generator, wherever that is, and whoever else is in the batch."""
    place = device if place == "device" else torch.device("cpu")

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator(place).manual_seed(seed) for seed in seeds]

    def draw(rows: slice, generator) -> torch.Tensor:
        given = {name: tensor[rows] for name, tensor in drawing.items()}
        output = exact.generate(**given, **DRAWING, do_sample=True, generator=generator)
        return output[:, drawing["input_ids"].shape[1] :]

    both = draw(slice(0, 2), generators(1, 2))
    assert torch.equal(both, draw(slice(0, 2), generators(1, 2)))
    assert not torch.equal(both, draw(slice(0, 2), generators(3, 4)))
    for row in (0, 1):
        alone = draw(slice(row, row + 1), generators(1 + row))[0]
        assert torch.equal(alone, both[row, : len(alone)])
    one = draw(slice(0, 2), generators(5)[0])
    assert torch.equal(one, draw(slice(0, 2), generators(5)[0]))


def test_pipeline(exact, recorded_processor, checkpoint, device):
    """Prompts to pictures, seeded on either side, one by one and together."""
    parts = {"model": exact, "processor": recorded_processor}
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.float32, **parts).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def draw(texts: list[str], seeds: list[int]) -> torch.Tensor:
        generator = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return pipeline(texts, num_inference_steps=3, generator=generator, output_type="pt").images.cpu()

    both = draw(["a red circle", "a cat"], [1, 2])
    for row, text in enumerate(("a red circle", "a cat")):
        torch.testing.assert_close(draw([text], [row + 1])[0], both[row], atol=1e-3, rtol=0)


def test_codes_and_pixels_at_the_same_time(exact, recorded_processor, checkpoint, device):
    """Pictures of several batches are the same bits as one batch after the other."""
    parts = {"model": exact, "processor": recorded_processor}
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint, dtype=torch.float32, **parts).to(device)
    pipeline.set_progress_bar_config(disable=True)
    texts = ["a red circle", "a cat", "two green squares on a table", "a dog", "a bird"]

    def draw(texts: list[str], first: int, **options) -> torch.Tensor:
        generator = [torch.Generator(device).manual_seed(first + row) for row in range(len(texts))]
        options |= {"num_inference_steps": 3, "output_type": "pt", "generator": generator}
        return pipeline(texts, **options).images

    alone = torch.cat([draw(texts[start : start + 2], start) for start in range(0, len(texts), 2)])
    for _ in range(3):
        assert torch.equal(draw(texts, 0, batch_size=2), alone)


def test_nothing_is_left_on_the_gpu(exact, inputs, cuda):
    """Calls of the same kind take no more memory from one to the next."""
    used = []
    for _ in range(4):
        exact.generate(**inputs, **CAPTION, num_beams=1)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated(cuda))
    assert used[-1] <= used[1]


def test_peak_memory_of_guidance(exact, drawing, cuda):
    """Guidance doubles rows of the cache, and not the weights."""
    weights = sum(parameter.nbytes for parameter in exact.parameters())
    exact.generate(**drawing, **DRAWING, do_sample=False, cache_implementation="dynamic")
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_allocated(cuda)
    exact.generate(**drawing, **DRAWING, do_sample=False, cache_implementation="dynamic")
    assert torch.cuda.max_memory_allocated(cuda) - before < max(weights, 32 * 2**20)
