"""Adapters of PEFT other than plain LoRA, and several at once. `test_lora` saves, merges and trains LoRA."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.training import get_lora_config
from tiny_models import attached_inputs, build_model, light_inputs, make_prompts, random_pixels

LINEARS = r".*language_model.*\.(q_proj|v_proj|down_proj)"
CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "dora": lambda model: get_lora_config(model, use_dora=True),
    "loha": lambda model: LoHaConfig(r=4, target_modules=LINEARS),
    "ia3": lambda model: IA3Config(target_modules=LINEARS, feedforward_modules=r".*down_proj", **CAUSAL),
}


@pytest.fixture(scope="module")
def base() -> LavitForConditionalGeneration:
    return build_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(3)


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def train(adapted: PeftModel, inputs: dict) -> PeftModel:
    placeholder = adapted.get_base_model().config.image_token_id
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == placeholder, -100)
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=0.5)
    adapted.train()(**inputs, labels=labels).loss.backward()
    optimizer.step()
    return adapted.eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def adapted(request, base, pixels) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), CONFIGS[request.param](base))
    return train(model, light_inputs(base, pixels))


def test_adapters_learn_with_images_and_can_be_switched_off(adapted, base, pixels):
    for inputs in (light_inputs(base, pixels), attached_inputs(base, pixels)):
        expected = logits(base, inputs)
        assert (logits(adapted, inputs) - expected).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted, inputs), expected)
        output = adapted.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert torch.equal(output[:, :-3], inputs["input_ids"])


@pytest.mark.filterwarnings("ignore:.*embedding")
def test_adapters_survive_saving_and_merging(adapted, base, pixels, tmp_path):
    inputs = light_inputs(base, pixels)
    expected = logits(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is LavitForConditionalGeneration
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)


def random_lora(base, seed: int, name: str = "default") -> PeftModel:
    torch.manual_seed(seed)
    config = get_lora_config(base, init_lora_weights=False, modules_to_save=None)
    return get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()


def test_several_adapters(base, pixels):
    inputs = attached_inputs(base, pixels)
    model = random_lora(base, 0, "captions")
    captions = logits(model, inputs)
    torch.manual_seed(1)
    model.add_adapter("answers", get_lora_config(base, init_lora_weights=False, modules_to_save=None))
    torch.testing.assert_close(logits(model, inputs), captions)
    model.set_adapter("answers")
    answers = logits(model, inputs)
    assert (answers - captions).abs().max() > 0.1
    model.delete_adapter("answers")
    model.set_adapter("captions")
    torch.testing.assert_close(logits(model, inputs), captions)


def test_load_adapter_on_the_model_itself(base, pixels, tmp_path):
    inputs = attached_inputs(base, pixels)
    trained = {name: random_lora(base, seed) for seed, name in enumerate(("captions", "answers"))}
    model = copy.deepcopy(base)
    for name, one in trained.items():
        one.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name, one in trained.items():
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        torch.testing.assert_close(logits(model, inputs), logits(one, inputs))
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    model.disable_adapters()
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs))


def test_prefix_tuning_with_images(base, pixels):
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL))
    for inputs in (light_inputs(base, pixels), attached_inputs(base, pixels)):
        output = logits(adapted.eval(), inputs)
        assert output.shape == logits(base, inputs).shape
        assert (output - logits(base, inputs)).abs().max() > 1e-3


def test_prompt_tuning_with_discrete_images(base):
    """PEFT embeds the ids by itself, which placeholders of features have no rows for."""
    codes = [base.config.boi_token_id, *range(92, 97), base.config.eoi_token_id]
    inputs = make_prompts(base, [[codes, [5, 6]], [[7, 8]]])
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), PromptTuningConfig(num_virtual_tokens=4, **CAUSAL))
    before = logits(adapted.eval(), inputs)
    train(adapted, inputs)
    assert (logits(adapted, inputs) - before).abs().max() > 1e-3
    assert adapted.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
