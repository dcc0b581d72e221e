"""Images of a chosen number of tokens: the model reads what it would read of the same patches, and nothing else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import NUM_PATCHES, ROWS, build_model, make_prompts, random_pixels

BUDGETS = [3, 1, NUM_PATCHES]


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(3)


def budgeted_inputs(model, pixels, rows=ROWS, budgets=BUDGETS) -> dict[str, torch.Tensor]:
    """What a processor gives with `num_image_tokens`."""
    prompts = make_prompts(model, rows, list(budgets))
    return {**prompts, "pixel_values": pixels, "num_image_tokens": torch.tensor(budgets)}


def packed_inputs(model, pixels, rows=ROWS, budgets=BUDGETS) -> dict[str, torch.Tensor]:
    """The same images encoded before."""
    with torch.no_grad():
        features = model.visual_tokenizer.embed(pixels, num_tokens=budgets).features
    return {**make_prompts(model, rows, list(budgets)), "image_features": features}


@torch.no_grad()
def test_logits_are_those_of_the_kept_patches(model, pixels):
    inputs = budgeted_inputs(model, pixels)
    output, expected = model(**inputs), model(**packed_inputs(model, pixels))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert output.attention_mask is None  # nothing is packed
    image_features = model.get_image_features(pixels, num_image_tokens=BUDGETS)
    assert [len(tokens) for tokens in image_features.pooler_output] == BUDGETS
    assert image_features.keep_mask.sum(dim=-1).tolist() == BUDGETS


@torch.no_grad()
def test_rows_of_different_budgets_equal_single_rows(model, pixels):
    rows = [["image", [5, 6, 7]], ["image", [8, 9]], ["image", [10]]]
    inputs = budgeted_inputs(model, pixels, rows)
    logits = model(**inputs).logits
    for index, budget in enumerate(BUDGETS):
        alone = budgeted_inputs(model, pixels[index : index + 1], rows[index : index + 1], [budget])
        expected = model(**alone).logits[0]
        torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_generation(model, pixels, options):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    ids = model.generate(**budgeted_inputs(model, pixels), **options)
    assert torch.equal(ids, model.generate(**packed_inputs(model, pixels), **options))


def test_one_token_per_patch_is_no_budget_by_chance(model, pixels):
    """As many placeholders as patches leave it to the selector, unless the budget says so."""
    decided = make_prompts(model, ROWS)
    kept_all = {**decided, "pixel_values": pixels, "num_image_tokens": torch.tensor([NUM_PATCHES] * 3)}
    with torch.no_grad():
        all_logits = model(**kept_all).logits
        some_logits = model(**decided, pixel_values=pixels).logits
    assert (all_logits[:, -1] - some_logits[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_prior_moves_tokens(model, pixels):
    prior = torch.zeros(3, NUM_PATCHES)
    prior[:, :4] = 50.0  # more than any score
    inputs = {**budgeted_inputs(model, pixels, budgets=[4, 4, 4]), "image_log_prior": prior}
    mask = torch.arange(NUM_PATCHES).expand(3, -1) < 4
    features = model.visual_tokenizer.embed(pixels, keep_mask=mask).features
    expected = {**make_prompts(model, ROWS, [4, 4, 4]), "image_features": features}
    torch.testing.assert_close(model(**inputs).logits, model(**expected).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**expected, **options))
    undecided = {**make_prompts(model, ROWS), "pixel_values": pixels, "image_log_prior": -prior}
    kept = model.get_image_features(pixels, log_prior=-prior).keep_mask
    assert not kept[:, :4].any() and kept.any()
    assert model(**undecided).image_hidden_states.shape[0] == int(kept.sum())


def test_adapters(pixels):
    model = build_model()
    inputs = budgeted_inputs(model, pixels)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(adapted.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_image_tokens": torch.tensor([3, 2, NUM_PATCHES])}, "Each image needs as many placeholders"),
        ({"num_image_tokens": torch.tensor([3, 1])}, "2 numbers of tokens for 3 images"),
        ({"num_image_tokens": torch.tensor([3, 0, 1])}, f"1 to {NUM_PATCHES} tokens"),
        ({"pixel_values": None}, "say how to encode pixel_values"),
    ],
)
def test_budgets_that_do_not_fit(model, pixels, change, message):
    inputs = {**budgeted_inputs(model, pixels), **change}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)
