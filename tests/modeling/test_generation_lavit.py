"""`generate` with images in both forms: beams, several images, caches, continuation."""

import copy

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from lavit_hf.modeling.cache_lavit import CACHE_NAME
from tiny_models import (
    NUM_IMAGES,
    ROWS,
    attached_inputs,
    build_model,
    light_inputs,
    make_prompts,
    random_pixels,
    text_config,
)

FORMS = pytest.mark.parametrize("make_inputs", [attached_inputs, light_inputs], ids=["attached", "light"])
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def tiny():
    return build_model()


@pytest.fixture(scope="module")
def pixels():
    return random_pixels(NUM_IMAGES)


def rows_alone(model, pixels, **options):
    """New ids of every row of ROWS generated on its own, without padding."""
    images, new = [pixels[:1], pixels[1:3], None], []
    for row, row_images in zip(ROWS, images, strict=True):
        inputs = make_prompts(model, [row]) if row_images is None else attached_inputs(model, row_images, [row])
        new.append(model.generate(**inputs, **NEW, **options)[:, inputs["input_ids"].shape[1] :])
    return torch.cat(new)


@FORMS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_batch_generates_what_its_rows_generate_alone(tiny, pixels, make_inputs, options, cache):
    inputs = make_inputs(tiny, pixels)
    output = tiny.generate(**inputs, **NEW, **options, **cache)
    width, repeats = inputs["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(output[:, :width], inputs["input_ids"].repeat_interleave(repeats, dim=0))
    assert torch.equal(output[:, width:], rows_alone(tiny, pixels, **options))


@FORMS
def test_generation_is_repeated_argmax(tiny, pixels, make_inputs):
    inputs = make_inputs(tiny, pixels)
    output = tiny.generate(**inputs, **NEW)
    step = copy.deepcopy(inputs)
    for _ in range(6):
        logits = tiny(**step).logits[:, -1]
        logits[:, tiny.config.visual_token_ids] = -torch.inf
        logits[:, tiny.config.text_config.eos_token_id] = -torch.inf
        step["input_ids"] = torch.cat([step["input_ids"], logits.argmax(dim=-1, keepdim=True)], dim=1)
        step["attention_mask"] = nn.functional.pad(step["attention_mask"], (0, 1), value=1)
    assert torch.equal(output, step["input_ids"])


@FORMS
def test_sampling_several_sequences(tiny, pixels, make_inputs):
    torch.manual_seed(0)
    inputs = make_inputs(tiny, pixels)
    output = tiny.generate(**inputs, **NEW, do_sample=True, num_return_sequences=4, top_k=0)
    assert output.shape == (12, inputs["input_ids"].shape[1] + 6)
    assert len({tuple(row) for row in output[:4, -6:].tolist()}) > 1


def test_images_are_encoded_once(tiny, pixels):
    model = copy.deepcopy(tiny)
    calls = []
    model.visual_tokenizer.vision_model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**light_inputs(model, pixels), **NEW, num_beams=3)
    assert len(calls) == 1
    inputs = attached_inputs(model, pixels)
    calls.clear()
    model.generate(**inputs, **NEW)
    assert not calls


def test_visual_ids_are_never_generated_by_default(tiny, pixels):
    model = copy.deepcopy(tiny)
    nn.init.zeros_(model.lm_head.weight)
    inputs = light_inputs(model, pixels)
    text_only = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0, eos_token_id=[])
    assert (text_only[:, inputs["input_ids"].shape[1] :] < model.config.boi_token_id).all()
    fewer = model.generate(
        **inputs, max_new_tokens=40, do_sample=True, top_k=0, eos_token_id=[], suppress_tokens=list(range(80))
    )
    assert set(fewer[:, inputs["input_ids"].shape[1] :].flatten().tolist()) == set(
        range(80, model.config.boi_token_id)
    )


def test_a_generation_config_is_used_without_complaint_and_left_alone(tiny, pixels, caplog):
    inputs = light_inputs(tiny, pixels)
    configured = GenerationConfig(pad_token_id=2, eos_token_id=2, **NEW)
    before = configured.to_dict()
    assert torch.equal(tiny.generate(**inputs, generation_config=configured), tiny.generate(**inputs, **NEW))
    assert configured.to_dict() == before
    assert not [record for record in caplog.records if "deprecated" in record.message]


def test_the_placeholder_is_never_generated_even_after_resizing(tiny, pixels):
    """Regression: a tokenizer has one row more than the embeddings, and resizing to it is a common reflex."""
    model = copy.deepcopy(tiny)
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    nn.init.zeros_(model.lm_head.weight)
    inputs = light_inputs(model, pixels)
    for mode in ("text", "interleaved"):
        output = model.generate(**inputs, generation_mode=mode, max_new_tokens=60, do_sample=True, eos_token_id=[])
        assert (output[:, inputs["input_ids"].shape[1] :] < model.config.image_token_id).all()


@FORMS
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_new_image_in_a_later_turn(tiny, pixels, make_inputs, cache):
    """Regression: rows were rewritten across what the cache holds already, if the first turn was long."""
    options = {"max_cache_len": 128} if cache is StaticCache else {}
    cache = cache(config=tiny.config, **options)
    first = torch.arange(5, 35)[None]
    first = tiny.generate(first, attention_mask=torch.ones_like(first), cache=cache, **NEW)
    turn = make_inputs(tiny, pixels[:1], [["image", [9, 10]]])
    turn["input_ids"] = torch.cat([first, turn["input_ids"]], dim=1)
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    assert torch.equal(tiny.generate(**turn, cache=cache, **NEW), tiny.generate(**turn, **NEW))


def test_unknown_mode_is_refused(tiny):
    with pytest.raises(ValueError, match="generation_mode"):
        tiny.generate(torch.tensor([[5]]), generation_mode="audio", max_new_tokens=1)


@FORMS
def test_model_output_and_going_on_from_its_cache(tiny, pixels, make_inputs):
    inputs = make_inputs(tiny, pixels)
    whole = tiny.generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    first = tiny.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(first.sequences, whole[:, :-4]) and len(first.scores) == 4
    mask = nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    going_on = tiny.generate(
        first.sequences,
        attention_mask=mask,
        cache=first[CACHE_NAME],
        max_new_tokens=4,
        min_new_tokens=4,
    )
    assert torch.equal(going_on, whole)


@FORMS
@pytest.mark.parametrize("penalty", [{"encoder_repetition_penalty": 0.2}, {"encoder_no_repeat_ngram_size": 1}])
def test_penalties_of_what_the_prompt_says(tiny, pixels, make_inputs, penalty):
    """Regression: placeholders of images are no ids of the vocabulary."""
    said = set(range(3, 50))
    inputs = make_inputs(tiny, pixels[:1], [["image", sorted(said)]])
    start = inputs["input_ids"].shape[1]
    assert said & set(tiny.generate(**inputs, **NEW)[0, start:].tolist())
    assert not said & set(tiny.generate(**inputs, **NEW, **penalty)[0, start:].tolist())


@FORMS
def test_assisted_generation(tiny, pixels, make_inputs):
    inputs = make_inputs(tiny, pixels[:1], [ROWS[0]])
    expected = tiny.generate(**inputs, **NEW)
    assert torch.equal(tiny.generate(**inputs, **NEW, assistant_model=build_model()), expected)
    assert torch.equal(tiny.generate(**inputs, **NEW, prompt_lookup_num_tokens=2), expected)


@FORMS
def test_an_assistant_that_sees_no_images_is_refused(tiny, pixels, make_inputs):
    plain = LlamaForCausalLM(LlamaConfig(**text_config())).eval()
    with pytest.raises(ValueError, match="LlamaForCausalLM, which cannot take images as features"):
        tiny.generate(**make_inputs(tiny, pixels[:1], [ROWS[0]]), **NEW, assistant_model=plain)
    text = make_prompts(tiny, [[[5, 6, 7]]])
    codes = make_prompts(tiny, [[[tiny.config.boi_token_id, tiny.config.visual_token_offset, 5]]])
    for inputs in (text, codes):
        expected = tiny.generate(**inputs, **NEW)
        assert torch.equal(tiny.generate(**inputs, **NEW, assistant_model=plain), expected)


def test_numpy_integers_are_options(tiny, pixels):
    inputs = light_inputs(tiny, pixels)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    as_numpy = {name: np.int64(value) for name, value in options.items()}
    assert torch.equal(tiny.generate(**inputs, **as_numpy), tiny.generate(**inputs, **options))


@FORMS
def test_chunked_prefill(tiny, pixels, make_inputs):
    inputs = make_inputs(tiny, pixels)
    if Version(transformers.__version__) < Version("5.23"):  # It hands all images to every chunk.
        with pytest.raises(ValueError, match="placeholders"):
            tiny.generate(**inputs, **NEW, prefill_chunk_size=7)
        return
    expected = tiny.generate(**inputs, **NEW)
    assert torch.equal(tiny.generate(**inputs, **NEW, prefill_chunk_size=7), expected)


def test_text_only_prompts(tiny):
    inputs = make_prompts(tiny, [[[5, 6]], [[7, 8, 9]]])
    output = tiny.generate(**inputs, **NEW)
    alone = tiny.generate(**make_prompts(tiny, [[[5, 6]]]), **NEW)
    assert torch.equal(output[:1, 3:], alone[:, 2:])


def test_embeddings_equal_ids(tiny):
    inputs = make_prompts(tiny, [[[5, 6]], [[7, 8, 9]]])
    embeds = tiny.get_input_embeddings()(inputs["input_ids"])
    output = tiny.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **NEW)
    assert torch.equal(output, tiny.generate(**inputs, **NEW)[:, 3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.update(image_features=torch.zeros(3, 32)), "once"),
        (lambda inputs: inputs.update(pixel_values=inputs["pixel_values"][:1]), "1 images"),
        (lambda inputs: inputs.update(inputs_embeds=torch.zeros(3, 4, 32), input_ids=None), "need input_ids"),
        (lambda inputs: inputs.update(position_ids=torch.zeros_like(inputs["input_ids"])), "position_ids"),
        (lambda inputs: inputs.pop("pixel_values"), "no images were given"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny, pixels, change, message):
    inputs = light_inputs(tiny, pixels)
    change(inputs)
    with pytest.raises(ValueError, match=message):
        tiny.generate(**inputs, **NEW)


def test_a_single_placeholder_and_negative_ids_are_refused(tiny):
    model = tiny
    placeholder = torch.tensor([[model.config.image_token_id]])
    for call in (lambda: model(input_ids=placeholder), lambda: model.generate(placeholder, max_new_tokens=1)):
        with pytest.raises(ValueError, match="placeholders but no images"):
            call()
    for call in (model, lambda input_ids: model.generate(input_ids, max_new_tokens=1)):
        with pytest.raises(ValueError, match="ids are not negative"):
            call(input_ids=torch.tensor([[5, -100]]))


def test_an_alias_of_a_text_row_gives_what_the_id_outside_of_the_vocabulary_gives(pixels):
    outputs = []
    for image_token_id in (116, 0):  # that of models of old, and one as in published models
        model = build_model()
        model.config.image_token_id = image_token_id
        inputs = light_inputs(model, pixels)
        outputs.append(model(**inputs).logits)
        nn.init.zeros_(model.lm_head.weight)
        written = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=0, eos_token_id=[])
        assert (written[:, inputs["input_ids"].shape[1] :] != model.config.image_token_id).all()
    assert torch.equal(*outputs)


def test_padding_with_the_placeholder_is_refused(pixels):
    model = build_model()
    model.config.image_token_id = 0
    with pytest.raises(ValueError, match="pad_token_id=0 is the placeholder"):
        model.generate(**light_inputs(model, pixels), pad_token_id=0, max_new_tokens=2)
