"""Light rows are narrowed before the language model when no cache is wanted, as in training."""

import pytest
import torch

from lavit_hf import LavitForConditionalGeneration
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
    assert output.past_key_values is None
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
    assert model(**inputs).past_key_values is not None
    model.config.use_cache = False
    assert model(**inputs).past_key_values is None
    found = widths(model)
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert found[1:] == [1, 1]
