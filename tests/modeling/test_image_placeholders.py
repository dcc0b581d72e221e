"""Light rows are narrowed before the language model when no cache is wanted, as in training, or none is returned."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation import BaseStreamer

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.modeling.cache_lavit import CACHE_NAME
from lavit_hf.utils.progress import TokenProgress, progress_bar
from tiny_models import NUM_IMAGES, build_model, light_inputs, random_pixels


@pytest.fixture(scope="module")
def tiny() -> LavitForConditionalGeneration:
    return build_model()


@pytest.fixture
def inputs(tiny) -> dict[str, torch.Tensor]:
    inputs = light_inputs(tiny, random_pixels(NUM_IMAGES))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.config.image_token_id, -100)
    return inputs


def widths(model) -> list[int]:
    """Collects how many positions the language model computes."""
    found: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return found


def test_outputs_are_the_same_as_with_a_cache(tiny, inputs):
    with torch.no_grad():
        expected = tiny(**inputs, use_cache=True, output_hidden_states=True)
        output = tiny(**inputs, use_cache=False, output_hidden_states=True)
    assert output.get(CACHE_NAME) is None
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.config.image_token_id)
    assert output.logits.shape == expected.logits.shape
    torch.testing.assert_close(output.logits[is_text], expected.logits[is_text], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected.loss)
    assert [state.shape for state in output.hidden_states] == [state.shape for state in expected.hidden_states]


def test_empty_placeholders_cost_nothing(tiny, inputs):
    tokens = tiny.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    num_placeholders = (inputs["input_ids"] == tiny.config.image_token_id).sum(dim=-1)
    lengths = inputs["attention_mask"].sum(dim=-1) - num_placeholders
    lengths += torch.tensor([len(tokens[0]), len(tokens[1]) + len(tokens[2]), 0])
    found = widths(tiny)
    tiny(**inputs, use_cache=False)
    tiny(**inputs, use_cache=True)
    assert found == [int(lengths.max()), inputs["input_ids"].shape[1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_are_mostly_padding(tiny, inputs, side):
    expected = tiny(**inputs, use_cache=True).loss
    fillers = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    amount = (5, 0) if side == "left" else (0, 5)
    padded = {
        name: torch.nn.functional.pad(value, amount, value=fillers[name]) if name in fillers else value
        for name, value in inputs.items()
    }
    torch.testing.assert_close(tiny(**padded, use_cache=False).loss, expected)


def test_gradients_are_the_same_as_with_a_cache(inputs):
    model, found = build_model(), []
    for use_cache in (True, False):
        model.zero_grad()
        model(**inputs, use_cache=use_cache).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


def test_images_without_any_token(inputs):
    model = build_model()
    with torch.no_grad():
        model.visual_tokenizer.continuous.selector.out_proj_3.bias[0] -= 1000
    torch.testing.assert_close(model(**inputs, use_cache=False).loss, model(**inputs, use_cache=True).loss)


def test_the_configuration_decides_by_default(inputs):
    """Trainer sets it to False; `generate` has a cache all the same."""
    model = build_model()
    assert model(**inputs).get(CACHE_NAME) is not None
    model.config.use_cache = False
    assert model(**inputs).get(CACHE_NAME) is None
    found = widths(model)
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert found[1:] == [1, 1]


NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture
def prompt(inputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.fixture
def rows_alone(prompt) -> list[dict[str, torch.Tensor]]:
    """The rows of the prompt, each without padding."""
    images = [prompt["pixel_values"][:1], prompt["pixel_values"][1:], None]
    rows = []
    for ids, mask, pixels in zip(prompt["input_ids"], prompt["attention_mask"], images, strict=True):
        row = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        rows.append(row if pixels is None else {**row, "pixel_values": pixels})
    return rows


def prompt_width(model, **options) -> int:
    """How many positions the language model computes of a prompt."""
    model = copy.deepcopy(model)
    found = widths(model)
    model.generate(**options, max_new_tokens=2)
    return found[0]


def longest_row(model, prompt) -> int:
    found = widths(model := copy.deepcopy(model))
    with torch.no_grad():
        model(**prompt, use_cache=False)
    return found[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"use_cache": False},
        {"generation_mode": "interleaved", "guidance_scale": 2.0},
        {"stopping_criteria": StoppingCriteriaList([TokenProgress(progress_bar("Tokens", None, show=False))])},
    ],
    ids=["greedy", "beams", "no cache", "guided", "progress"],
)
def test_generate_runs_on_short_rows(tiny, prompt, options):
    shortest = longest_row(tiny, prompt)
    assert shortest < prompt["input_ids"].shape[1]
    assert prompt_width(tiny, **prompt, **options) == shortest


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"cache": DynamicCache},
        {"stopping_criteria": [lambda ids, scores, **_: ids[:, 0] < 0]},
        {"logits_processor": [lambda ids, scores: scores]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_who_counts_positions_sees_all_of_them(tiny, prompt, options):
    if "cache" in options:
        options = {"cache": options["cache"](config=tiny.config)}
    assert prompt_width(tiny, **prompt, **options) == prompt["input_ids"].shape[1]


@pytest.mark.parametrize("configured", [True, False])
def test_lengths_count_the_prompt_as_it_was_given(tiny, prompt, configured):
    width = prompt["input_ids"].shape[1]
    lengths = {"max_length": width + 5, "min_length": width + 5}
    options = {"generation_config": GenerationConfig(**lengths, pad_token_id=2)} if configured else lengths
    expected = tiny.generate(**prompt, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(tiny.generate(**prompt, **options), expected)
    with pytest.raises(ValueError, match=f"input_ids is {width}, but `max_length` is set to {width - 5}"):
        tiny.generate(**prompt, max_length=width - 5)


def test_streams_begin_with_the_prompt_as_it_was_given(tiny, rows_alone):
    """Regression: they began with the prompt as it was rewritten."""

    class Streamer(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    streamer = Streamer()
    output = tiny.generate(**rows_alone[0], **NEW, streamer=streamer)
    assert streamer.ids == [*output[0].tolist(), "end"]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["short", "wide"])
@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 0.2}, {"no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 0.2}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_padding_is_nothing_that_was_said(prompt, rows_alone, penalty, cache):
    """Regression: padding, which may be the end of text, counted as said, so that texts went on."""
    for seed in range(4):
        model = build_model(seed)
        output = model.generate(**prompt, **penalty, **cache, max_new_tokens=15)[:, prompt["input_ids"].shape[1] :]
        for row, alone in zip(output, rows_alone, strict=True):
            new = model.generate(**alone, **penalty, max_new_tokens=15)[0, alone["input_ids"].shape[1] :]
            assert row[: len(new)].tolist() == new.tolist() and set(row[len(new) :].tolist()) <= {2}
