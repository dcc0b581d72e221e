"""Steps that are compiled without being asked, as on a GPU: the same ids, few compilations, and nobody waits."""

import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from lavit_hf.modeling import compiled_steps, generation_lavit
from lavit_hf.modeling.cache_lavit import CACHE_NAME
from lavit_hf.modeling.compiled_steps import compiles_steps, keep_cache, take_cache
from lavit_hf.modeling.generation_lavit import GeneratorDraw, Guidance, ImageLength, InterleavedGrammar, SuppressIds
from tiny_models import TEXT_VOCAB, attached_inputs, build_model, make_prompts, random_pixels

DRAW = {"generation_mode": "image", "max_new_tokens": 8}
START = TEXT_VOCAB


@pytest.fixture
def tiny(monkeypatch):
    """A model on a device on which steps are compiled, here by a compiler that changes nothing."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiled_steps, "compiles_on", lambda device: True)
    model = build_model(seed=3)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    model.generation_config.compile_config = config
    return model


@pytest.fixture
def taken(monkeypatch):
    """The caches that calls got."""
    caches = []

    def take(*args):
        caches.append(take_cache(*args))
        return caches[-1]

    monkeypatch.setattr(generation_lavit, "take_cache", take)
    return caches


def prompt(model, *lengths, end=START):
    return make_prompts(model, [[[5 + index % 80 for index in range(length)] + [end]] for length in lengths])


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize(
    "make_options",
    [
        lambda: DRAW,
        lambda: {**DRAW, "guidance_scale": 3.0},
        lambda: {
            **DRAW,
            "guidance_scale": 3.0,
            "do_sample": True,
            "num_return_sequences": 2,
            "generator": generators(6),
        },
        lambda: {**DRAW, "do_sample": True, "generator": generators(1)[0], "max_drawn_tokens": [1, 2, 3]},
        lambda: {"generation_mode": "interleaved", "max_new_tokens": 8, "guidance_scale": 2.0},
        lambda: {"max_new_tokens": 8},
    ],
)
def test_ids_are_the_same(tiny, taken, make_options):
    inputs = prompt(tiny, 2, 0, 5)
    expected = tiny.generate(**inputs, **make_options(), cache_implementation="dynamic")
    assert not taken
    for _ in range(2):  # with a new cache, and with the one that was kept
        assert torch.equal(tiny.generate(**inputs, **make_options()), expected)
    assert taken[0] is taken[1] and counters["stats"]["unique_graphs"] == 1


def test_captions_are_the_same(tiny, taken):
    inputs = attached_inputs(tiny, random_pixels(2), [["image", [5, 6]], ["image", [7]]])
    expected = tiny.generate(**inputs, max_new_tokens=6, disable_compile=True)
    assert torch.equal(tiny.generate(**inputs, max_new_tokens=6), expected) and len(taken) == 1


@pytest.mark.skipif(
    torch.__version__ < compiled_steps.OLDEST_TORCH, reason="so old a PyTorch does not, and is not asked to"
)
def test_prompts_and_batches_of_any_size_share_few_compilations(tiny):
    """Of the first shapes; then for any length, and any number of rows but one. PyTorch gives up after eight."""

    def draw_all(*batches):
        for lengths in batches:
            for scale in (1.0, 3.0):
                tiny.generate(
                    **prompt(tiny, *lengths), generation_mode="image", max_new_tokens=3, guidance_scale=scale
                )
        return counters["stats"]["unique_graphs"]

    few = draw_all([3], [150], [3, 3], [1, 9, 150])
    assert few <= 5 and not counters["graph_break"]
    assert draw_all([40], [300], [2] * 4, [150, 7] * 3) == few


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded_static"},
        {"disable_compile": True},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"prefill_chunk_size": 2},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"synced_gpus": True},
    ],
)
def test_what_the_caller_says_is_done(tiny, options, monkeypatch):
    inputs = prompt(tiny, 4, end=7)
    given = generation_lavit._Options(None, tiny.generation_config, {**inputs, "max_new_tokens": 3, **options})
    assert tiny._take_static_cache(given, [], ()) is None
    if hasattr(tiny.generation_config, name := next(iter(options))):
        monkeypatch.setattr(tiny.generation_config, name, options[name])
        default = generation_lavit._Options(None, tiny.generation_config, {**inputs, "max_new_tokens": 3})
        assert tiny._take_static_cache(default, [], ()) is None


def test_what_a_generation_config_says_is_done(tiny, taken):
    inputs = prompt(tiny, 4)
    for options in ({"cache_implementation": "dynamic"}, {"disable_compile": True}):
        config = GenerationConfig(max_new_tokens=3, **options)
        tiny.generate(**inputs, generation_mode="image", generation_config=config)
    assert not taken
    tiny.generate(**inputs, generation_mode="image", generation_config=GenerationConfig(max_new_tokens=3))
    assert len(taken) == 1


def test_a_cache_of_the_caller_is_used(tiny, taken):
    cache = DynamicCache(config=tiny.config)
    tiny.generate(**prompt(tiny, 4), **DRAW, cache=cache)
    assert not taken and cache.get_seq_length() > 4


def test_no_cache_without_an_end_or_ids(tiny, taken):
    """transformers decides how long such calls may get, and where they start."""
    inputs = prompt(tiny, 4, end=7)
    tiny.generate(**inputs, max_length=9)
    tiny.generate(inputs_embeds=tiny.get_input_embeddings()(inputs["input_ids"]), max_new_tokens=3)
    assert not taken


def test_nothing_speaks_against_compiling(tiny):
    assert compiles_steps(tiny)


@pytest.mark.parametrize(
    "reason", ["training", "thread", "autocast", "attention", "window", "hook", "devices", "decoder"]
)
def test_what_speaks_against_compiling(tiny, reason, monkeypatch):
    if reason == "training":
        assert not compiles_steps(tiny.train())
    elif reason == "thread":
        found = []
        thread = threading.Thread(target=lambda: found.append(compiles_steps(tiny)))
        thread.start()
        thread.join()
        assert found == [False]
    elif reason == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not compiles_steps(tiny)
    elif reason == "attention":
        tiny.set_attn_implementation("flex_attention")
        assert not compiles_steps(tiny)
    elif reason == "window":
        tiny.config.text_config.layer_types = ["full_attention", "sliding_attention"]
        assert not compiles_steps(tiny)
    elif reason == "hook":
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(tiny.model.language_model.layers[1], ModelHook())
        assert not compiles_steps(tiny)
    elif reason == "devices":
        tiny.lm_head.to("meta")
        assert not compiles_steps(tiny)
    else:
        monkeypatch.setattr(type(tiny.model.language_model), "_can_compile_fullgraph", False)
        assert not compiles_steps(tiny)


def test_a_cpu_does_not_compile():
    assert not compiles_steps(build_model())


def test_a_gpu_without_a_compiler_does_not_compile(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(compiled_steps, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled_steps, "OLDEST_TORCH", "2")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled_steps.shutil, "which", lambda name: None)
    assert not compiled_steps.compiles_on(device)
    monkeypatch.setattr(compiled_steps.shutil, "which", lambda name: name == "clang")
    assert compiled_steps.compiles_on(device)
    with monkeypatch.context() as patch:
        patch.setattr(compiled_steps, "OLDEST_TORCH", "99")
        assert not compiled_steps.compiles_on(device)
    monkeypatch.setattr(compiled_steps, "find_spec", lambda name: None)
    assert not compiled_steps.compiles_on(device)


def filled(model, rows, length):
    cache = take_cache(model, rows, length)
    ids = torch.full((rows, 3), 5)
    model(input_ids=ids, **{CACHE_NAME: cache})
    keep_cache(model, cache)
    return cache


@torch.no_grad()
def test_a_cache_is_kept_for_calls_that_it_fits(tiny):
    cache = filled(tiny, 2, 130)
    assert cache.length == 256 and cache.get_seq_length() == 3
    assert take_cache(tiny, 2, 256) is cache and cache.get_seq_length() == 0
    assert take_cache(tiny, 2, 256) is not cache, "two calls at once would share it"
    for rows, length in ((3, 200), (2, 257), (2, 1)):
        cache = filled(tiny, 2, 600 if length == 1 else 130)
        assert take_cache(tiny, rows, length) is not cache
    cache = filled(tiny, 2, 130)
    with torch.inference_mode():
        assert take_cache(tiny, 2, 130) is not cache
    cache = filled(tiny, 2, 130)
    assert take_cache(tiny.bfloat16(), 2, 130) is not cache


@torch.no_grad()
def test_a_large_cache_is_not_kept(tiny, monkeypatch):
    cache = filled(tiny, 2, 130)
    heads, width = 2, 8
    assert cache.num_bytes() == 2 * 2 * 2 * heads * 256 * width * 4  # layers, keys and values, rows
    monkeypatch.setattr(type(tiny), "device", torch.device("cuda"))
    for share, is_kept in ((5, False), (20, True)):
        compiled_steps._kept.clear()
        properties = type("Properties", (), {"total_memory": share * cache.num_bytes()})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        keep_cache(tiny, cache)
        assert (tiny in compiled_steps._kept) == is_kept


def test_a_call_that_fails_keeps_nothing(tiny):
    class Failing(MaxLengthCriteria):
        def __call__(self, *args, **kwargs):
            raise RuntimeError("no more")

    tiny.generate(**prompt(tiny, 4), **DRAW)
    assert tiny in compiled_steps._kept
    with pytest.raises(RuntimeError, match="no more"):
        tiny.generate(**prompt(tiny, 4), **DRAW, stopping_criteria=StoppingCriteriaList([Failing(9)]))
    assert tiny not in compiled_steps._kept


def test_a_cache_goes_with_its_model():
    model = build_model()
    cache = weakref.ref(filled(model, 1, 9))
    assert cache() is not None
    del model
    gc.collect()
    assert cache() is None


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::multinomial", "aten::is_nonzero", "aten::equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        is_copy = name == "aten::_to_copy" and args[0].device.type != (kwargs or {}).get("device", args[0].device).type
        is_choice = name == "aten::index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.NAMES or is_copy or is_choice:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def waits(model, steps, **options):
    inputs = prompt(model, 2, 0, 5)
    with Waits() as mode:
        model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, **options)
    return mode.counts.total()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("generator", [None, "one", "each"])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_a_step_waits_for_nothing_but_to_learn_whether_it_was_the_last(scale, generator, mode):
    """transformers looks at that after every step; drawing adds nothing to it."""
    model = build_model(seed=3)
    text = waits(model, 6) - waits(model, 3)

    def draw(steps):
        options = {"generation_mode": mode, "guidance_scale": scale, "max_drawn_tokens": 9, "image_end_bias": -1.0}
        if generator is not None:
            options["generator"] = generators(3) if generator == "each" else generators(1)[0]
        return waits(model, steps, do_sample=generator is not None, **options)

    assert draw(6) - draw(3) == text


def test_processors_look_at_no_numbers_and_copy_none(tiny):
    """After the first step, which puts on the device what they need: on `meta` there are no numbers to look at."""
    size = tiny.config.text_config.vocab_size
    processors = [
        Guidance(tiny.config, 3.0, negative_ids=torch.full((2, 3), START), negative_mask=torch.ones(2, 3)),
        Guidance(tiny.config, 3.0),
        InterleavedGrammar(tiny.config),
        ImageLength(tiny.config, [1, 2], [3, 4], [0.5, 0.0]),
        SuppressIds([3, size + 5]),
    ]
    ids = torch.empty(2, 7, dtype=torch.long, device="meta")
    for processor in processors:
        rows = 4 if isinstance(processor, Guidance) else 2
        processor(ids, torch.empty(rows, size, device="meta"))
        with Waits() as mode:
            processor(ids, torch.empty(rows, size, device="meta"))
        assert not mode.counts, type(processor)


def test_draws_are_those_of_multinomial():
    """So that a seed draws what it drew before, and what it draws elsewhere."""
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    expected = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(1))
    drawn = GeneratorDraw(torch.Generator().manual_seed(1))(torch.zeros(4, 1), scores)
    assert torch.equal(drawn.isfinite().nonzero()[:, 1:], expected)
    apart = GeneratorDraw(generators(4))(torch.zeros(4, 1), scores).isfinite().nonzero()[:, 1]
    for row, generator in enumerate(generators(4)):
        assert apart[row] == torch.multinomial(scores[row].softmax(-1), 1, generator=generator)


def test_nothing_to_draw_from(tiny):
    """Regression: what `torch.multinomial` refuses would have been drawn."""
    nothing = LogitsProcessorList([lambda input_ids, scores: scores.fill_(-torch.inf)])
    with pytest.raises(ValueError, match="nothing to draw from"):
        tiny.generate(**prompt(tiny, 3), **DRAW, do_sample=True, generator=generators(1)[0], logits_processor=nothing)
