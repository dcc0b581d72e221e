"""Going on from caches that hold images whose placeholders are partly empty."""

import copy
import logging
import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging

from lavit_hf import LavitDynamicCache, LavitForConditionalGeneration
from lavit_hf.modeling.cache_lavit import (
    CACHE_NAME,
    LavitGenerateBeamDecoderOnlyOutput,
    LavitGenerateDecoderOnlyOutput,
)
from tiny_models import (
    NUM_IMAGES,
    NUM_PATCHES,
    attached_inputs,
    build_model,
    light_inputs,
    make_prompts,
    random_pixels,
)

NEW = {"max_new_tokens": 4, "min_new_tokens": 4}
MORE = {"max_new_tokens": 8, "min_new_tokens": 8}
DICT = {"return_dict_in_generate": True}


@pytest.fixture(scope="module")
def tiny() -> LavitForConditionalGeneration:
    return build_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(NUM_IMAGES)


@pytest.fixture(scope="module")
def keeps_all() -> LavitForConditionalGeneration:
    model = build_model()
    with torch.no_grad():
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[0] += 1000
    assert set(model.visual_tokenizer.embed(random_pixels(2)).num_tokens.tolist()) == {NUM_PATCHES}
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def caches_of_the_caller(model) -> dict:
    return {
        "dynamic": {"cache": DynamicCache(config=model.config)},
        "static": {"cache": StaticCache(config=model.config, max_cache_len=128)},
        "implementation": {"cache_implementation": "static"},
    }


def longer(mask: torch.Tensor, amount: int = 4) -> torch.Tensor:
    return nn.functional.pad(mask, (0, amount), value=1)


def test_a_cropped_cache_forgets_what_was_cropped(tiny, pixels):
    inputs = light_inputs(tiny, pixels[:1], [[[5, 6], "image", [7]]])
    width = inputs["input_ids"].shape[1]
    cache = tiny(**inputs, use_cache=True)[CACHE_NAME]
    cache.crop(-2)
    kept = int(cache.get_seq_length())
    new_ids = torch.tensor([[20, 21, 22]])
    actual = tiny(input_ids=new_ids, attention_mask=torch.ones(1, kept + 3), cache=cache).logits
    counts = tiny.visual_tokenizer.embed(pixels[:1]).num_tokens.tolist()
    attached = make_prompts(tiny, [[[5, 6], "image", [7]]], counts)["input_ids"][:, :-2]
    ids = torch.cat([attached, new_ids], dim=1)
    features = tiny.visual_tokenizer.embed(pixels[:1]).features
    expected = tiny(input_ids=ids, image_features=features).logits[:, -3:]
    assert cache.attention_mask.shape == (1, kept)
    assert int(cache.attention_mask.sum()) == attached.shape[1] and width > attached.shape[1]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_other_rows_cannot_go_on_from_a_cache_with_empty_placeholders(tiny, pixels):
    output = tiny(**light_inputs(tiny, pixels), use_cache=True)
    with pytest.raises(ValueError, match="rows go on from it"):
        tiny(input_ids=torch.tensor([[20]]), cache=output[CACHE_NAME])
    with pytest.raises(ValueError, match="attention_mask has 1 positions"):
        tiny(
            input_ids=torch.tensor([[20]] * 3),
            attention_mask=torch.ones(3, 1),
            cache=output[CACHE_NAME],
        )


@pytest.mark.parametrize("use", [copy.deepcopy, lambda cache: cache], ids=["copy", "itself"])
def test_the_returned_cache_knows_its_mask(tiny, pixels, use):
    inputs = light_inputs(tiny, pixels)
    output = tiny(**inputs, use_cache=True)
    assert type(output[CACHE_NAME]) is LavitDynamicCache
    step = torch.tensor([[20], [21], [22]])
    expected = tiny(
        input_ids=torch.cat([inputs["input_ids"], step], dim=1),
        attention_mask=longer(inputs["attention_mask"], 1),
        pixel_values=pixels,
    ).logits[:, -1:]
    cache = use(output[CACHE_NAME])
    for mask in (inputs["attention_mask"], output.attention_mask, None):
        mask = None if mask is None else longer(mask, 1)
        actual = tiny(input_ids=step, attention_mask=mask, cache=cache).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        cache.crop(-1)


@pytest.mark.parametrize(
    ("rearrange", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    ],
    ids=["select", "repeat", "reorder"],
)
def test_rows_take_their_mask_along(tiny, pixels, rearrange, rows):
    """Regression: rearranged caches could not be gone on from."""
    inputs = light_inputs(tiny, pixels)
    step = torch.tensor([[20], [21], [22]])
    mask = longer(inputs["attention_mask"], 1)
    cache = tiny(**inputs, use_cache=True)[CACHE_NAME]
    expected = tiny(input_ids=step, attention_mask=mask, cache=copy.deepcopy(cache)).logits[rows]
    rearrange(cache)
    actual = tiny(input_ids=step[rows], attention_mask=mask[rows], cache=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_cache_is_taken_by_either_name(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    step, mask = torch.tensor([[20], [21], [22]]), longer(inputs["attention_mask"], 1)
    whole = tiny.generate(**inputs, **MORE)
    first = tiny.generate(**inputs, **NEW, **DICT)
    logits = []
    for name in ("cache", "past_key_values"):
        cache = tiny(**inputs, use_cache=True)[CACHE_NAME]
        logits.append(tiny(input_ids=step, attention_mask=mask, **{name: cache}).logits)
        given = {name: copy.deepcopy(first[CACHE_NAME]), "attention_mask": longer(inputs["attention_mask"])}
        assert torch.equal(tiny.generate(first.sequences, **given, **NEW), whole)
    assert torch.equal(*logits)
    assert logits[0].shape[1] == 1


def test_a_cache_is_passed_once(tiny):
    caches, ids = {"cache": DynamicCache(), "past_key_values": DynamicCache()}, torch.tensor([[5, 6]])
    for call in (tiny, tiny.model, tiny.generate):
        with pytest.raises(ValueError, match="Pass the cache once"):
            call(input_ids=ids, **caches)


def test_transformers_warns_of_no_old_name(tiny, pixels, caplog, monkeypatch):
    inputs = light_inputs(tiny, pixels)
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        first = tiny.generate(**inputs, **NEW, **DICT)
        tiny.generate(first.sequences, cache=first[CACHE_NAME], attention_mask=first.attention_mask, **NEW)
        tiny(**inputs, use_cache=True)
    assert "past_key_values" not in caplog.text


def test_a_reset_cache_is_a_new_one(tiny, pixels):
    cache = tiny(**light_inputs(tiny, pixels), use_cache=True)[CACHE_NAME]
    cache.reset()
    ids = torch.tensor([[5, 6, 7]])
    actual = tiny(input_ids=ids, cache=cache).logits
    torch.testing.assert_close(actual, tiny(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_a_text_only_cache_stays_a_plain_one(tiny):
    assert type(tiny(input_ids=torch.tensor([[5, 6]]), use_cache=True)[CACHE_NAME]) is DynamicCache
    assert type(tiny.generate(torch.tensor([[5, 6]]), **NEW, **DICT)[CACHE_NAME]) is DynamicCache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_other_caches_of_forward_are_left_alone(tiny, pixels, kind, caplog):
    class Plain(DynamicCache):
        pass

    inputs = light_inputs(tiny, pixels)
    cache = Plain(config=tiny.config) if kind == "dynamic" else caches_of_the_caller(tiny)[kind]["cache"]
    attributes = set(vars(cache))
    output = tiny(**inputs, cache=cache)
    assert output[CACHE_NAME] is cache and set(vars(cache)) == attributes
    assert f"A {type(cache).__name__} does not know which image placeholders are empty" in caplog.text
    step = torch.tensor([[20], [21], [22]])
    own = tiny(**inputs, use_cache=True)[CACHE_NAME]
    mask = longer(output.attention_mask, 1)
    expected = tiny(input_ids=step, attention_mask=mask, cache=own).logits
    actual = tiny(input_ids=step, attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static", "implementation"])
def test_generate_goes_on_from_other_caches_with_the_mask_of_the_output(tiny, pixels, kind):
    inputs = light_inputs(tiny, pixels)
    whole = tiny.generate(**inputs, **MORE)
    first = tiny.generate(**inputs, **NEW, **DICT, **caches_of_the_caller(tiny)[kind])
    assert type(first) is LavitGenerateDecoderOnlyOutput and not isinstance(first[CACHE_NAME], LavitDynamicCache)
    assert not any(isinstance(value, torch.Tensor) for value in vars(first[CACHE_NAME]).values())
    assert first.attention_mask.shape == first.sequences.shape
    cache = {"cache": first[CACHE_NAME]}
    if kind != "implementation":  # that one has no room left
        going_on = tiny.generate(first.sequences, attention_mask=first.attention_mask, **cache, **NEW)
        assert torch.equal(going_on, whole)


@pytest.mark.parametrize("kind", ["dynamic", "static", "implementation"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("pad_token_id", [2, None])
def test_other_caches_without_the_mask_are_refused(pixels, kind, padding, pad_token_id):
    """What the cache holds as padding would be seen, silently."""
    tiny = build_model()
    tiny.generation_config.pad_token_id = pad_token_id
    inputs = light_inputs(tiny, pixels)
    inputs["input_ids"] = nn.functional.pad(inputs["input_ids"], (padding, 0), value=2)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (padding, 0), value=0)
    first = tiny.generate(**inputs, **NEW, **DICT, **caches_of_the_caller(tiny)[kind])
    cache = {"cache": first[CACHE_NAME]}
    with pytest.raises(ValueError, match="attention_mask hides nothing but padding"):
        tiny.generate(first.sequences, attention_mask=longer(inputs["attention_mask"]), **cache, **NEW)
    with pytest.raises(ValueError, match="attention_mask hides nothing but padding"):
        tiny.generate(first.sequences, **cache, **NEW)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_the_cache_of_generate_knows_its_mask(tiny, pixels, options):
    inputs = light_inputs(tiny, pixels)
    torch.manual_seed(0)
    output = tiny.generate(**inputs, **NEW, **DICT, **options)
    cache = output[CACHE_NAME]
    assert type(cache) is LavitDynamicCache
    assert len(cache.attention_mask) == len(cache.layers[0].keys)
    kind = LavitGenerateBeamDecoderOnlyOutput if "num_beams" in options else LavitGenerateDecoderOnlyOutput
    assert type(output) is kind and output.attention_mask.shape == output.sequences.shape
    if "num_beams" in options:
        return
    repeats = options.get("num_return_sequences", 1)
    masks = [output.attention_mask, longer(inputs["attention_mask"]).repeat_interleave(repeats, dim=0)]
    going_on = [
        tiny.generate(output.sequences, attention_mask=mask, cache=copy.deepcopy(cache), **NEW) for mask in masks
    ]
    attached = attached_inputs(tiny, pixels)
    features = attached.pop("image_features")
    rows = features.split(tiny.visual_tokenizer.embed(pixels).num_tokens.tolist())
    assert torch.equal(*going_on)
    width = output.sequences.shape[1]
    for row in range(len(output.sequences)):
        prompt = attached["input_ids"][row // repeats][attached["attention_mask"][row // repeats].bool()]
        ids = torch.cat([prompt, output.sequences[row, -4:]])[None]
        images = [rows[:1], rows[1:], ()][row // repeats]
        given = {"image_features": torch.cat(images)} if images else {}
        alone = tiny.generate(ids, attention_mask=torch.ones_like(ids), **given, **NEW)
        assert torch.equal(going_on[0][row, width:], alone[0, -4:])


def test_beams_go_on_from_a_repeated_cache(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    first = tiny.generate(**inputs, **NEW, **DICT)
    mask = longer(inputs["attention_mask"])
    expected = tiny.generate(first.sequences, attention_mask=mask, pixel_values=pixels, num_beams=3, **NEW)
    first[CACHE_NAME].batch_repeat_interleave(3)
    options = {"cache": first[CACHE_NAME], "num_beams": 3}
    assert torch.equal(tiny.generate(first.sequences, attention_mask=mask, **options, **NEW), expected)


def test_images_without_empty_placeholders_need_no_other_mask(keeps_all):
    inputs = light_inputs(keeps_all, random_pixels(2), [["image", [5]], ["image", [6]]])
    whole = keeps_all.generate(**inputs, **MORE)
    first = keeps_all.generate(**inputs, **NEW, **DICT)
    options = {"cache": first[CACHE_NAME], **NEW}
    mask = longer(inputs["attention_mask"])
    assert torch.equal(keeps_all.generate(first.sequences, attention_mask=mask, **options), whole)
    single = {name: value[:1] for name, value in inputs.items()}
    assistant = {"assistant_model": build_model(seed=1), **MORE}
    assert torch.equal(keeps_all.generate(**single, **assistant), whole[:1])
    assert torch.equal(keeps_all.generate(**single, **{**assistant, "assistant_model": keeps_all}), whole[:1])


def test_turns_with_images_in_a_cache_of_the_caller(tiny, pixels):
    cache = LavitDynamicCache(config=tiny.config)
    ids, seen = torch.tensor([[5, 6]]), 0
    for images in (pixels[:1], None, pixels[1:3]):
        row = [[7]] if images is None else [[8], *["image"] * len(images), [9]]
        ids = torch.cat([ids, make_prompts(tiny, [row])["input_ids"]], dim=1)
        seen += 0 if images is None else len(images)
        turn = {"attention_mask": torch.ones_like(ids), **NEW}
        new = {} if images is None else {"pixel_values": images}
        expected = tiny.generate(ids, pixel_values=pixels[:seen], **turn)
        ids = tiny.generate(ids, **new, **turn, cache=cache)
        assert torch.equal(ids, expected)


def test_new_ids_alone_may_hold_an_image(tiny, pixels):
    """Regression: a turn longer than what the cache holds was taken for everything."""
    cache = LavitDynamicCache(config=tiny.config)
    first = tiny.generate(torch.tensor([[5, 6]]), cache=cache, max_new_tokens=1, min_new_tokens=1)
    tiny(input_ids=first[:, -1:], cache=cache)
    turn = make_prompts(tiny, [["image", [7]]])["input_ids"]
    ids = torch.cat([first, turn], dim=1)
    mask = torch.ones_like(ids)
    expected = tiny.generate(ids, attention_mask=mask, pixel_values=pixels[:1], **NEW)
    output = tiny.generate(turn, attention_mask=mask, pixel_values=pixels[:1], cache=cache, **NEW)
    assert torch.equal(output, expected[:, first.shape[1] :])


def test_what_an_interrupted_call_leaves_in_the_cache_is_known(tiny, pixels):
    class Interruption(Exception):
        pass

    def interrupt(input_ids, scores, **kwargs):
        if input_ids.shape[1] == width + 3:
            raise Interruption
        return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = light_inputs(tiny, pixels)
    width = inputs["input_ids"].shape[1]
    cache = LavitDynamicCache(config=tiny.config)
    with pytest.raises(Interruption):
        tiny.generate(**inputs, **MORE, cache=cache, stopping_criteria=[interrupt])
    whole = tiny.generate(**inputs, **MORE)
    ids = whole[:, : width + 3]
    options = {"cache": cache, "max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(tiny.generate(ids, attention_mask=longer(inputs["attention_mask"], 3), **options), whole)


def test_drawing_leaves_the_mask_of_the_prompts(tiny, pixels):
    rows = [["image", [5], [tiny.config.boi_token_id]], [[6, 7], "image", [8, tiny.config.boi_token_id]]]
    inputs = light_inputs(tiny, pixels[:2], rows)
    options = {"generation_mode": "image", "guidance_scale": 3.0, "max_new_tokens": 3, **DICT}
    cache = LavitDynamicCache(config=tiny.config)
    mine = tiny.generate(**inputs, **options, cache=cache)
    theirs = tiny.generate(**inputs, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert torch.equal(cache.attention_mask, theirs[CACHE_NAME].attention_mask)
    assert len(cache.attention_mask) == len(cache.layers[0].keys) == 2
