"""Visual tokens out of `generate`: guidance in one batch, generators, caches, interleaved text and images."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.modeling.cache_lavit import CACHE_NAME
from tiny_models import CODEBOOK_SIZE, NUM_PATCHES, build_model, light_inputs, make_prompts, random_pixels

CACHES = pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
DRAW = {"generation_mode": "image", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tiny():
    return build_model(seed=3)


@pytest.fixture(scope="module")
def prompts(tiny):
    """Four prompts of different lengths, one of them the image start alone."""
    boi = tiny.config.boi_token_id
    return make_prompts(tiny, [[[5, 6, 7, boi]], [[boi]], [[8, boi]], [[9, 10, 11, 12, 13, 14, boi]]])


def new_ids(model, inputs, **options):
    return model.generate(**inputs, **{**DRAW, **options})[:, inputs["input_ids"].shape[1] :]


def row(inputs, index):
    """A row of a batch without its padding."""
    mask = inputs["attention_mask"][index].bool()
    return {
        "input_ids": inputs["input_ids"][index : index + 1, mask],
        "attention_mask": torch.ones(1, int(mask.sum())),
    }


def is_code(model, ids):
    offset = model.config.visual_token_offset
    return (ids >= offset) & (ids < offset + CODEBOOK_SIZE)


def guided_reference(model, inputs, scale, steps, context):
    """Greedy guidance spelled out for one prompt, without cache, unconditional rows or a restricted head."""
    config = model.config
    ids, negative = inputs["input_ids"], torch.tensor([context])
    for _ in range(steps):
        conditional = model(input_ids=ids).logits[:, -1].log_softmax(dim=-1)
        unconditional = model(input_ids=negative).logits[:, -1].log_softmax(dim=-1)
        scores = unconditional + scale * (conditional - unconditional)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, config.eoi_token_id : config.visual_token_offset + CODEBOOK_SIZE] = 0
        token = (scores + allowed).argmax(dim=-1, keepdim=True)
        ids, negative = torch.cat([ids, token], dim=-1), torch.cat([negative, token], dim=-1)
        if token.item() == config.eoi_token_id:
            break
    return ids[:, inputs["input_ids"].shape[1] :]


@CACHES
def test_guidance_equals_two_separate_passes(tiny, prompts, cache):
    batch = new_ids(tiny, prompts, guidance_scale=3.0, **cache)
    for index in range(4):
        with torch.no_grad():
            expected = guided_reference(tiny, row(prompts, index), 3.0, 8, [tiny.config.boi_token_id])
        assert torch.equal(batch[index, : expected.shape[1]], expected[0])
        assert (batch[index, expected.shape[1] :] == 2).all()


def test_guidance_equals_that_of_transformers(tiny, prompts):
    for index in range(4):
        inputs = row(prompts, index)
        unbatched = LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, tiny)])
        expected = new_ids(tiny, inputs, logits_processor=unbatched)
        assert torch.equal(new_ids(tiny, inputs, guidance_scale=3.0), expected)


def test_guidance_changes_what_is_drawn(tiny, prompts):
    assert not torch.equal(new_ids(tiny, prompts), new_ids(tiny, prompts, guidance_scale=5.0))


def test_negative_prompts(tiny, prompts):
    boi = tiny.config.boi_token_id
    negative = torch.tensor([[2, 20, 21, 22, 23, 24, 25, 26, boi]])  # longer than the prompts, padded
    mask = torch.ones_like(negative)
    mask[:, 0] = 0
    options = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": mask}
    output = tiny.generate(**prompts, **DRAW, guidance_scale=3.0, **options)
    width = prompts["input_ids"].shape[1]
    assert torch.equal(output[:, :width], prompts["input_ids"])
    with torch.no_grad():
        expected = guided_reference(tiny, row(prompts, 0), 3.0, 8, negative[0, 1:].tolist())
    assert torch.equal(output[0, width:][: expected.shape[1]], expected[0])


def test_only_codes_and_the_end_are_drawn(tiny, prompts):
    flat = copy.deepcopy(tiny)
    nn.init.zeros_(flat.lm_head.weight)
    drawn = flat.generate(**prompts, generation_mode="image", do_sample=True, top_k=0, max_new_tokens=30)
    drawn = drawn[:, prompts["input_ids"].shape[1] :]
    for ids in drawn:
        end = (ids == tiny.config.eoi_token_id).nonzero()
        length = int(end[0]) if len(end) else len(ids)
        assert is_code(tiny, ids[:length]).all()
        assert (ids[length + 1 :] == 2).all()


def test_suppress_tokens_replaces_the_default(tiny, prompts):
    codes = list(range(tiny.config.visual_token_offset, tiny.config.text_config.vocab_size))
    drawn = new_ids(tiny, prompts, suppress_tokens=[*codes, tiny.config.eoi_token_id])
    assert not is_code(tiny, drawn).any()


def test_added_tokens_are_never_drawn(tiny, prompts):
    """Rows behind the codes, which `resize_token_embeddings` makes, belong to text."""
    larger = copy.deepcopy(tiny)
    first = tiny.config.image_token_id + 1
    larger.resize_token_embeddings(first + 2, mean_resizing=False)
    nn.init.zeros_(larger.lm_head.weight)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    width = prompts["input_ids"].shape[1]
    for suppressed in ({}, {"suppress_tokens": list(range(3, tiny.config.boi_token_id))}):
        drawn = larger.generate(**prompts, **options, **suppressed, generation_mode="image")
        assert (drawn[:, width:] < first - 1).all()
    written = larger.generate(**prompts, **options, suppress_tokens=list(range(first)), generation_mode="text")
    assert (written[:, width:] >= first).all()


def test_the_head_computes_allowed_ids_only(tiny, prompts, monkeypatch):
    sizes = []
    original = nn.functional.linear

    def spy(hidden, weight, *rest):
        sizes.append(len(weight))
        return original(hidden, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", spy)
    new_ids(tiny, prompts, guidance_scale=3.0, max_new_tokens=2)
    assert sizes.count(CODEBOOK_SIZE + 1) == 2 and tiny.config.text_config.vocab_size not in sizes


def test_scores_span_the_vocabulary(tiny, prompts):
    output = tiny.generate(
        **prompts, **DRAW, guidance_scale=3.0, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    width = prompts["input_ids"].shape[1]
    assert len(output.scores) == len(output.logits) == output.sequences.shape[1] - width
    vocabulary = torch.arange(tiny.config.text_config.vocab_size)
    is_allowed = is_code(tiny, vocabulary) | (vocabulary == tiny.config.eoi_token_id)
    for scores in output.scores:
        assert scores.shape == (4, len(vocabulary))
        assert (scores[:, ~is_allowed] == -torch.inf).all() and scores[:, is_allowed].isfinite().all()
    assert torch.equal(output.scores[0].argmax(dim=-1), output.sequences[:, width])
    assert len(output[CACHE_NAME].layers[0].keys) == 4


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_outputs_are_those_of_the_prompts(tiny, prompts, cache):
    """What the model computed for unconditional rows is not returned: logits are as those of a plain call."""
    model = copy.deepcopy(tiny)
    model.set_attn_implementation("eager")
    names = ("output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    output = model.generate(**prompts, **DRAW, **cache, guidance_scale=3.0, **dict.fromkeys(names, True))
    step = {"input_ids": output.sequences[:, :-1], "attention_mask": output.sequences[:, :-1].ne(2).long()}
    with torch.no_grad():
        plain = model(**step, output_hidden_states=True)
    first = prompts["input_ids"].shape[1] - 1
    codes = slice(model.config.eoi_token_id, model.config.visual_token_offset + CODEBOOK_SIZE)
    for index, logits in enumerate(output.logits):
        going_on = step["attention_mask"][:, first + index].bool()
        torch.testing.assert_close(logits[going_on, codes], plain.logits[going_on, first + index, codes])
        assert (logits[:, : codes.start] == -torch.inf).all()
    assert len(output.attentions) == len(output.hidden_states) == len(output.logits)
    assert all(len(layer) == 4 for one in (*output.attentions, *output.hidden_states) for layer in one)
    torch.testing.assert_close(output.hidden_states[0][-1][:, -1], plain.hidden_states[-1][:, first])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scores_of_a_generator_show_what_was_drawn(tiny, prompts, scale):
    options = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "min_new_tokens": 8}
    generator = torch.Generator().manual_seed(0)
    output = tiny.generate(**prompts, **DRAW, **options, guidance_scale=scale, generator=generator)
    drawn = output.sequences[:, prompts["input_ids"].shape[1] :]
    for index, scores in enumerate(output.scores):
        assert (scores.isfinite().sum(dim=-1) == 1).all()
        assert torch.equal(scores.argmax(dim=-1), drawn[:, index])


class StopAt(StoppingCriteria):
    """Stops a row at a length of its own."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] == self.lengths


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_stopped_rows_leave_their_generators_where_they_are(tiny, prompts, scale):
    """What is drawn from a generator later, such as noise, does not depend on how long other rows are."""
    width = prompts["input_ids"].shape[1]
    lengths = [2, 7, 1, 5]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    criteria = StoppingCriteriaList([StopAt([width + length for length in lengths])])
    options = {"guidance_scale": scale, "do_sample": True, "min_new_tokens": 8}
    drawn = new_ids(tiny, prompts, generator=generators, stopping_criteria=criteria, **options)
    assert drawn.ne(2).sum(dim=-1).tolist() == lengths
    for index, length in enumerate(lengths):
        alone = torch.Generator().manual_seed(index)
        ids = new_ids(
            tiny,
            row(prompts, index),
            generator=alone,
            **options | {"max_new_tokens": length, "min_new_tokens": length},
        )
        assert torch.equal(drawn[index, :length], ids[0])
        assert torch.equal(generators[index].get_state(), alone.get_state())


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_synced_processes_wait_for_the_longest(tiny, prompts, mode, monkeypatch):
    """Regression: a process that had finished left the loop, and the layers of others waited for its weights."""
    steps, peer_steps = [], 12

    def all_reduce(flag, **_):  # as if another process drew for so many steps
        flag += len(steps) < peer_steps

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    expected = new_ids(tiny, prompts, generation_mode=mode, guidance_scale=3.0)
    monkeypatch.setattr(
        tiny, "_compute_logits", lambda *args: steps.append(1) or type(tiny)._compute_logits(tiny, *args)
    )
    drawn = new_ids(tiny, prompts, generation_mode=mode, guidance_scale=3.0, synced_gpus=True)
    assert torch.equal(drawn, expected) and len(steps) == peer_steps


def test_prompts_in_chunks(tiny, prompts):
    """Without guidance; with it, they are refused."""
    assert torch.equal(new_ids(tiny, prompts, prefill_chunk_size=3), new_ids(tiny, prompts))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_static_caches_are_returned_without_unconditional_rows(tiny, prompts, scale):
    """Regression: these caches cannot select rows as dynamic ones do."""
    expected = new_ids(tiny, prompts, guidance_scale=scale)
    options = {"guidance_scale": scale, "cache_implementation": "static", "return_dict_in_generate": True}
    for _ in range(2):
        output = tiny.generate(**prompts, **DRAW, **options)
        assert torch.equal(output.sequences[:, prompts["input_ids"].shape[1] :], expected)
        assert len(output[CACHE_NAME].layers[0].keys) == 4


def test_compiled_steps_draw_the_same(tiny, prompts):
    """Steps are compiled as a whole; transformers does so on a CPU only if it is told to."""
    options = {"guidance_scale": 3.0, "max_new_tokens": 4}
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    compiled = new_ids(tiny, prompts, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(compiled, new_ids(tiny, prompts, **options))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_guidance_fills_an_empty_cache_and_leaves_the_prompts_in_it(tiny, prompts, kind):
    cache = kind(config=tiny.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    drawn = new_ids(tiny, prompts, guidance_scale=3.0, cache=cache)
    assert torch.equal(drawn, new_ids(tiny, prompts, guidance_scale=3.0))
    assert len(cache.layers[0].keys) == 4
    with pytest.raises(ValueError, match="filled cache"):
        new_ids(tiny, prompts, guidance_scale=3.0, cache=cache)


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 0.2},
        {"encoder_no_repeat_ngram_size": 1},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_penalties_go_with_guidance(tiny, penalty, scale):
    """Regression: transformers makes some for every prompt, others for every sequence."""
    offset, boi = tiny.config.visual_token_offset, tiny.config.boi_token_id
    half = [list(range(offset + index % 2, offset + CODEBOOK_SIZE, 2)) for index in range(4)]
    prompts = make_prompts(tiny, [[[5] * index, half[index], [boi]] for index in range(4)])
    options = {"guidance_scale": scale, "do_sample": True, "top_k": 1}  # certain, but may return several sequences
    penalized = new_ids(tiny, prompts, **options, **penalty, num_return_sequences=2)
    assert not torch.equal(penalized[::2], new_ids(tiny, prompts, **options))
    for index in range(8):
        alone = new_ids(tiny, row(prompts, index // 2), **options, **penalty)
        assert torch.equal(penalized[index, : alone.shape[1]], alone[0])


def test_processors_of_the_caller_are_left_as_they_are(tiny):
    """Regression: they were cut in half, as if they knew of unconditional rows."""
    offset, boi = tiny.config.visual_token_offset, tiny.config.boi_token_id
    half = [list(range(offset + index % 2, offset + CODEBOOK_SIZE, 2)) for index in range(2)]
    prompts = make_prompts(tiny, [[[*half[index], boi]] for index in range(2)])
    given = LogitsProcessorList(
        [
            EncoderNoRepeatNGramLogitsProcessor(1, prompts["input_ids"]),
            EncoderRepetitionPenaltyLogitsProcessor(0.2, prompts["input_ids"]),
        ]
    )
    drawn = new_ids(tiny, prompts, guidance_scale=3.0, logits_processor=given)
    options = {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 0.2}
    assert torch.equal(drawn, new_ids(tiny, prompts, guidance_scale=3.0, **options))
    assert given[0].batch_size == 2 and len(given[1].encoder_input_ids) == 2


@CACHES
def test_a_batch_draws_what_its_rows_draw_alone(tiny, prompts, cache):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"guidance_scale": 2.0, "do_sample": True, "top_k": 10, **cache}
    batch = new_ids(tiny, prompts, generator=generators, **options)
    for index in range(4):
        alone = new_ids(tiny, row(prompts, index), generator=torch.Generator().manual_seed(index), **options)
        assert torch.equal(batch[index, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("mode", ["image", "text", "interleaved"])
def test_generators_leave_the_global_state_alone(tiny, prompts, mode):
    options = {"generation_mode": mode, "do_sample": True, "top_k": 0, "min_new_tokens": 8}
    state = torch.get_rng_state()
    first, again, other = (
        new_ids(tiny, prompts, generator=torch.Generator().manual_seed(seed), **options) for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_several_sequences_per_prompt(tiny, prompts):
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    options = {"guidance_scale": 2.0, "do_sample": True, "top_k": 0}
    drawn = new_ids(tiny, prompts, num_return_sequences=2, generator=generators, **options)
    assert len(drawn) == 8
    alone = new_ids(tiny, row(prompts, 2), generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(drawn[5, : alone.shape[1]], alone[0])


def test_minimum_length_forbids_the_end(tiny, prompts):
    drawn = new_ids(tiny, prompts, min_new_tokens=6, do_sample=True, generator=torch.Generator().manual_seed(0))
    assert is_code(tiny, drawn[:, :6]).all()


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3 * NUM_PATCHES}, {"guidance_scale": 2.0}])
def test_an_image_is_no_longer_than_its_patches_by_default(tiny, prompts, options):
    """Regression: without an end there was a code more than patches, which no pixel decoder takes."""

    def avoid_the_end(input_ids, scores):
        scores[:, tiny.config.eoi_token_id] -= 1e4
        return scores

    drawn = tiny.generate(**row(prompts, 0), generation_mode="image", logits_processor=[avoid_the_end], **options)
    assert lengths(tiny, drawn[:, row(prompts, 0)["input_ids"].shape[1] :]) == [NUM_PATCHES]


# How long an image is


def lengths(model, ids):
    """Codes of every row before the image end; `None` where there is no end."""
    ends = [(row == model.config.eoi_token_id).nonzero().flatten().tolist() for row in ids]
    return [end[0] if end else None for end in ends]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_get_as_many_codes_as_asked_for(tiny, prompts, scale):
    options = {"guidance_scale": scale, "max_new_tokens": None}
    limits = [2, 5, 1, NUM_PATCHES]
    ids = new_ids(tiny, prompts, min_drawn_tokens=limits, max_drawn_tokens=torch.tensor(limits), **options)
    assert lengths(tiny, ids) == limits
    assert is_code(tiny, ids).sum(dim=-1).tolist() == limits
    several = new_ids(
        tiny,
        prompts,
        max_drawn_tokens=limits,
        min_drawn_tokens=limits,
        num_return_sequences=2,
        do_sample=True,
        **options,
    )
    assert lengths(tiny, several) == [length for length in limits for _ in range(2)]


def test_limits_that_change_nothing_change_nothing(tiny, prompts):
    expected = new_ids(tiny, prompts, guidance_scale=2.0)
    same = {"min_drawn_tokens": 0, "max_drawn_tokens": NUM_PATCHES, "image_end_bias": 0.0}
    assert torch.equal(new_ids(tiny, prompts, guidance_scale=2.0, **same), expected)


def test_a_bias_on_the_end_makes_images_shorter_and_longer(tiny, prompts):
    options = {"do_sample": True, "max_new_tokens": None, "num_return_sequences": 8}
    mean = {}
    for bias in (-20.0, 0.0, 20.0):
        torch.manual_seed(0)
        ids = new_ids(tiny, prompts, image_end_bias=bias, **options)
        mean[bias] = sum(lengths(tiny, ids)) / len(ids)
    assert mean[20.0] == 0 and mean[-20.0] == NUM_PATCHES and 0 < mean[0.0] < NUM_PATCHES
    torch.manual_seed(0)
    mixed = lengths(tiny, new_ids(tiny, prompts, image_end_bias=[20.0, -20.0, 20.0, -20.0], **options))
    assert mixed == [length for length in (0, NUM_PATCHES, 0, NUM_PATCHES) for _ in range(8)]


def test_limits_hold_for_every_image_between_texts(tiny):
    boi, eoi = tiny.config.boi_token_id, tiny.config.eoi_token_id
    inputs = make_prompts(tiny, [[[5, boi]], [[6, 7, boi]]])
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": None, "sequence_bias": [[[boi], 5.0]]}
    torch.manual_seed(0)
    ids = tiny.generate(
        **inputs, generation_mode="interleaved", min_drawn_tokens=[2, 4], max_drawn_tokens=[3, 4], **options
    )
    for one, allowed in zip(ids.tolist(), ({2, 3}, {4}), strict=True):
        starts = [index for index, token in enumerate(one) if token == boi]
        ends = [index for index, token in enumerate(one) if token == eoi]
        assert len(ends) > 1 and {end - start - 1 for start, end in zip(starts, ends, strict=False)} <= allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_drawn_tokens": 5, "max_drawn_tokens": 3}, "in order"),
        ({"min_drawn_tokens": [1, 2], "max_drawn_tokens": [3, 4, 5]}, "2 values of min_drawn_tokens, but 3 of max"),
        ({"min_drawn_tokens": NUM_PATCHES + 1}, "in order"),
        ({"max_drawn_tokens": NUM_PATCHES + 1}, f"from 1 to {NUM_PATCHES}"),
        ({"max_drawn_tokens": 0}, f"from 1 to {NUM_PATCHES}"),
        ({"min_drawn_tokens": -1}, "in order"),
        ({"min_drawn_tokens": 1.5}, "must be integers"),
        ({"max_drawn_tokens": [1, 2]}, "2 values .* for 4 prompts"),
        ({"image_end_bias": math.inf}, "finite"),
        ({"max_drawn_tokens": 3, "generation_mode": "text"}, "for images that are drawn"),
    ],
)
def test_limits_that_cannot_be(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        new_ids(tiny, prompts, **options)


def test_prompts_with_images(tiny):
    """Continuous images may stand before what is drawn, in the light form, too; unconditional rows do not see them."""
    boi = tiny.config.boi_token_id
    pixels = random_pixels(3)
    rows = [["image", [5, boi]], [[8], "image", [9], "image", [10, boi]], [[14, boi]]]
    inputs = light_inputs(tiny, pixels, rows)
    drawn = new_ids(tiny, inputs, guidance_scale=2.0)
    for index, images in enumerate((pixels[:1], pixels[1:], None)):
        alone = make_prompts(tiny, [rows[index]]) | ({} if images is None else {"pixel_values": images})
        expected = new_ids(tiny, alone, guidance_scale=2.0)
        assert torch.equal(drawn[index, : expected.shape[1]], expected[0])


class Recorder(TextStreamer):
    def __init__(self):
        self.received, self.has_ended = [], False

    def put(self, value):
        self.received += value.flatten().tolist()

    def end(self):
        self.has_ended = True


def test_streamers_receive_prompt_and_new_ids(tiny, prompts):
    streamer, inputs = Recorder(), row(prompts, 0)
    output = tiny.generate(**inputs, **DRAW, guidance_scale=2.0, streamer=streamer)
    assert streamer.received == output[0].tolist() and streamer.has_ended


def interleaved_reference(model, ids, scale, steps):
    """Interleaved decoding spelled out for one prompt: the unconditional row is built anew at every step."""
    config = model.config
    visual = torch.zeros(config.text_config.vocab_size, dtype=torch.bool)
    visual[config.visual_token_ids] = True
    length = len(ids)
    for _ in range(steps):
        starts = [index for index, id in enumerate(ids) if id == config.boi_token_id]
        inside = bool(starts) and config.eoi_token_id not in ids[starts[-1] :]
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        if inside:
            unconditional = model(input_ids=torch.tensor([ids[starts[-1] :]])).logits[0, -1].log_softmax(dim=-1)
            scores = unconditional + scale * (scores - unconditional)
            forbidden = ~visual
            forbidden[config.boi_token_id] = True
            if len(ids) - starts[-1] > NUM_PATCHES:
                forbidden = torch.ones_like(visual)
                forbidden[config.eoi_token_id] = False
        else:
            forbidden = visual.clone()
            forbidden[config.boi_token_id] = False
        ids = [*ids, int(scores.masked_fill(forbidden, -torch.inf).argmax())]
        if ids[-1] == 2:
            break
    return ids[length:]


@CACHES
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_interleaved_text_and_images(tiny, cache, scale):
    model = copy.deepcopy(tiny)
    config = model.config
    with torch.no_grad():  # Make starts and ends of images likely.
        model.lm_head.weight[config.boi_token_id] *= 2
        model.lm_head.weight[config.eoi_token_id] *= 1.5
    prompts = make_prompts(model, [[[5, 6]], [[7, 8, 9, config.boi_token_id]], [[11]]])
    options = {"generation_mode": "interleaved", "guidance_scale": scale, "max_new_tokens": 50, **cache}
    batch = new_ids(model, prompts, **options)
    opened = 0
    for index in range(3):
        with torch.no_grad():
            expected = interleaved_reference(model, row(prompts, index)["input_ids"][0].tolist(), scale, 50)
        opened += expected.count(config.boi_token_id)
        assert batch[index, : len(expected)].tolist() == expected
    assert opened > 0, "the test needs images that start on their own"


@pytest.mark.parametrize("num_codes", [0, 3, NUM_PATCHES])
def test_images_that_the_prompt_opens_are_no_longer_than_others(tiny, num_codes):
    """Regression: codes were counted from the end of the prompt, and one more was allowed."""
    model, config = copy.deepcopy(tiny), tiny.config
    nn.init.zeros_(model.lm_head.weight)
    codes = [config.visual_token_offset] * num_codes
    inputs = make_prompts(model, [[[5, config.boi_token_id, *codes]]])
    rarely = {"sequence_bias": {(config.eoi_token_id,): -50.0}}
    options = {"generation_mode": "interleaved", "max_new_tokens": NUM_PATCHES + 2, **rarely}
    drawn = new_ids(model, inputs, **options)[0].tolist()
    assert drawn.index(config.eoi_token_id) == NUM_PATCHES - num_codes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"assistant_model": build_model()}, "assistant_model: ids are generated one by one"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_mtp": True}, "use_mtp"),
        ({"custom_generate": "owner/name"}, "custom_generate"),
        ({"prefill_chunk_size": 2, "guidance_scale": 2.0}, "prefill_chunk_size cannot be combined with guidance"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"generator": [torch.Generator()]}, "generators for 4"),
        ({"negative_prompt_ids": torch.tensor([[5]])}, "guidance_scale"),
        ({"negative_prompt_ids": torch.tensor([[5]] * 3), "guidance_scale": 2.0}, "3 negative prompts"),
        (
            {"generation_mode": "interleaved", "negative_prompt_ids": torch.tensor([[5]]), "guidance_scale": 2.0},
            "are for",
        ),
        ({"position_ids": torch.zeros(4, 7, dtype=torch.long), "guidance_scale": 2.0}, "position_ids"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        new_ids(tiny, prompts, **options)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_guidance_has_to_be_finite(tiny, prompts, scale):
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        new_ids(tiny, prompts, guidance_scale=scale)


@pytest.mark.parametrize("generator", [0, [torch.Generator(), 1]])
def test_something_else_than_a_generator_is_refused(tiny, prompts, generator):
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        new_ids(tiny, prompts, generator=generator)


def test_prompts_without_an_image_start_are_refused(tiny):
    with pytest.raises(ValueError, match="image start"):
        tiny.generate(**make_prompts(tiny, [[[5, 6]]]), **DRAW)


TEXTS = ["a white background with a cat", "a picture of a rocket left of a pizza at the bottom on a blue background"]
# How to draw, and the first codes of every sequence.
RECORDED = {
    "unguided greedy": [[169, 169, 65, 65, 65, 65], [679, 679, 679, 1110, 1110, 1837]],
    "guided greedy": [[169, 65, 1388, 1388, 1388, 65], [270, 1110, 1110, 997, 997, 997]],
    "guided greedy static": [[169, 65, 1388, 1388, 1388, 65], [270, 1110, 1110, 997, 997, 997]],
    "guided penalties": [[169, 65, 1388, 1388, 65, 65], [270, 1110, 1110, 997, 997, 1468]],
    "guided negative": [[1388, 1388, 65, 65, 65, 65], [679, 1110, 1110, 997, 997, 997]],
    "guided one generator": [[169, 23, 1388, 1388, 65, 65], [679, 1110, 1110, 997, 1468, 1031]],
    "guided generators each": [
        [169, 65, 1388, 1388, 1388, 65],
        [169, 65, 1388, 1388, 1388, 65],
        [270, 1110, 1021, 997, 997, 1468],
        [1837, 320, 1110, 1110, 997, 997],
    ],
    "unguided each": [
        [1388, 1388, 1388, 1466, 1366, 65],
        [1658, 1387, 169, 169, 169, 65],
        [320, 679, 1565, 2046, 1455, 1110],
        [896, 320, 1110, 1110, 157, 1809],
    ],
    "guided each static": [
        [169, 65, 1388, 1388, 1388, 65],
        [169, 65, 1388, 1388, 1388, 65],
        [270, 1110, 1021, 997, 997, 1468],
        [1837, 320, 1110, 1110, 997, 997],
    ],
    "interleaved guided each": [
        [169, 65, 1388, 1388, 1388, 65],
        [169, 65, 1388, 1388, 1388, 65],
        [270, 1110, 1021, 997, 997, 1468],
        [1837, 320, 1110, 1110, 997, 997],
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
        negative = processor(text="a blue background with a big pumpkin", generation_mode="image", return_tensors="pt")
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
