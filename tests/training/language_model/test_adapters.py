"""Adapters: what LoRA adapts, its training and drawing; other adapters of PEFT; what is saved, found and merged."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.conversion.weight_files import ConversionError
from lavit_hf.pipelines import LavitTextToImagePipeline
from lavit_hf.training import get_lora_config, merge_adapter
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.language_model import adapters
from lavit_hf.training.language_model.adapters import apply_adapter, find_adapter, save_adapter_card
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_models import attached_inputs, build_model, light_inputs, make_prompts, random_pixels, spread_selector
from tiny_parts import CHECKPOINT, CODES, build_text_model, build_vision_model, picture_rows

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def build_lavit(model_type: str = "llama") -> LavitForConditionalGeneration:
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        vision_model=build_vision_model(), text_model=build_text_model(model_type), **CODES
    )
    spread_selector(model.visual_tokenizer)
    return model


def adapted_modules(model: nn.Module) -> set[str]:
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    return {name.removeprefix("base_model.model.") for name in names}


def trained_copies(model: nn.Module) -> set[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    return {name.removeprefix("base_model.model.") for name in names}


def example(model) -> dict[str, torch.Tensor]:
    """A light image, text, and an image that is drawn."""
    config = model.config
    image = [config.boi_token_id, *[config.image_token_id] * 16, config.eoi_token_id]
    drawn = [config.boi_token_id, *config.visual_token_ids[2::5], config.eoi_token_id]
    return {"input_ids": torch.tensor([[*image, 5, 6, 7, *drawn]]), "pixel_values": random_pixels(1)}


def adapt(model, steps: int = 4) -> PeftModel:
    """A PEFT model whose adapters and trained copies differ from their start."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, get_lora_config(model)).train()
    inputs = example(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(steps):
        adapted(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


# What is adapted


def test_language_model_and_projection_are_adapted_and_nothing_else():
    model = get_peft_model(build_lavit(), get_lora_config())
    layers = {f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in LLAMA_LINEARS}
    assert adapted_modules(model) == {*layers, "model.multi_modal_projector"}
    assert trained_copies(model) == {
        "model.language_model.embed_tokens.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.weight",
    }


def test_plain_all_linear_would_adapt_the_visual_tokenizer():
    model = get_peft_model(build_lavit(), LoraConfig(target_modules="all-linear"))
    inside = {name for name in adapted_modules(model) if "visual_tokenizer" in name}
    assert any("discrete.quantizer" in name for name in inside) and any("vision_model" in name for name in inside)


@pytest.mark.parametrize(
    ("model_type", "embeddings", "linears"),
    [
        ("gpt2", "wte", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gemma", "embed_tokens", set(LLAMA_LINEARS)),
    ],
)
def test_other_language_models_and_tied_embeddings(model_type, embeddings, linears):
    model = build_lavit(model_type)
    adapted = get_peft_model(model, get_lora_config(model))
    # Trained once, and still tied.
    assert trained_copies(adapted) == {f"model.language_model.{embeddings}.modules_to_save.default.weight"}
    assert adapted.get_input_embeddings().weight is adapted.get_output_embeddings().weight
    inside = {name.split(".", 4)[-1] for name in adapted_modules(adapted) if "projector" not in name}
    assert inside == linears


def test_values_can_be_replaced():
    config = get_lora_config(build_lavit("gemma"), r=4, modules_to_save=None)
    assert (config.r, config.lora_alpha, config.modules_to_save, config.ensure_weight_tying) == (4, 32, None, False)
    model = get_peft_model(build_lavit(), get_lora_config(exclude_modules=r".*(visual_tokenizer|projector).*"))
    assert not any("projector" in name for name in adapted_modules(model))


def test_gradients_reach_adapters_embeddings_head_and_nothing_else():
    model = build_lavit()
    adapted = get_peft_model(model, get_lora_config(model)).train()
    inputs = example(model)
    adapted(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 346, -100)).loss.backward()
    reached = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert reached == {name for name, value in adapted.named_parameters() if value.requires_grad}
    expected = ("lora_A", "lora_B", "embed_tokens.modules_to_save", "lm_head.modules_to_save")
    assert all(any(part in name for part in expected) for name in reached)
    assert not any("visual_tokenizer" in name for name in reached)


# Saving, loading, merging, drawing


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma", "phi"])
def saved(request, tmp_path_factory):
    """A base model, an adapted one, and where both are saved."""
    root = tmp_path_factory.mktemp(request.param)
    build_lavit(request.param).save_pretrained(root / "base")
    adapted = adapt(LavitForConditionalGeneration.from_pretrained(root / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about the embeddings it saves
        adapted.save_pretrained(root / "adapter")
    return SimpleNamespace(base=root / "base", adapter=root / "adapter", model=adapted)


def draw(model) -> torch.Tensor:
    prompt = torch.tensor([[5, 6, model.config.boi_token_id]])
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_mode="image",
        guidance_scale=2.0,
        max_new_tokens=5,
        min_new_tokens=5,
    )


def test_adapters_are_saved_without_the_base_and_load_again(saved):
    files = {path.name for path in saved.adapter.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    names = load_file(saved.adapter / "adapter_model.safetensors").keys()
    assert not any("visual_tokenizer" in name for name in names)
    inputs = example(saved.model)
    with torch.no_grad():
        expected = saved.model(**inputs).logits
        base = LavitForConditionalGeneration.from_pretrained(saved.base)
        assert (base(**inputs).logits - expected).abs().max() > 0.1
        again = PeftModel.from_pretrained(base, saved.adapter)
        torch.testing.assert_close(again(**inputs).logits, expected)
        # transformers finds the base model by itself.
        found = LavitForConditionalGeneration.from_pretrained(saved.adapter)
        torch.testing.assert_close(found(**inputs).logits, expected)
    assert torch.equal(draw(again), draw(saved.model))
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    assert torch.equal(again.generate(**inputs, **options), saved.model.generate(**inputs, **options))


@pytest.mark.filterwarnings("ignore:Input and output embeddings")
def test_merged_model_equals_the_adapted_one(saved, tmp_path):
    inputs = example(saved.model)
    base = LavitForConditionalGeneration.from_pretrained(saved.base)
    merged = PeftModel.from_pretrained(base, saved.adapter).merge_and_unload()
    assert type(merged) is LavitForConditionalGeneration
    merged.save_pretrained(tmp_path)
    again = LavitForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = saved.model(**inputs).logits
        for model in (merged, again):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(draw(again), draw(saved.model))


def test_drawing_uses_the_trained_head(saved):
    """The shortcut that computes only some rows of a plain head must not read the base model's."""
    model = saved.model
    ids, part = torch.tensor([[5, 6, 7]]), (model.config.eoi_token_id, model.config.text_config.vocab_size)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[..., slice(*part)]
        torch.testing.assert_close(model(input_ids=ids, vocab_slice=part).logits, expected)
        with model.disable_adapter():
            assert (model(input_ids=ids, vocab_slice=part).logits - expected).abs().max() > 0.1


# Trainer


def build_trainer(output_dir: Path, lora: dict | None = None, **arguments) -> Trainer:
    torch.manual_seed(0)
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    model = get_peft_model(base, get_lora_config(base, **(lora or {"lora_dropout": 0.1})))
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=base)
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=TrainingDataset(picture_rows(11)),
        data_collator=LavitDataCollator(processor, seed=1),
        processing_class=processor,
        callbacks=[EpochCallback()],
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_by_plain_trainer_and_resumes_bit_equal(tmp_path):
    whole = build_trainer(tmp_path / "whole")
    frozen = whole.model.base_model.model.visual_tokenizer.state_dict()
    before = {name: value.clone() for name, value in frozen.items()}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())

    first = build_trainer(tmp_path / "part", save_strategy="steps", save_steps=3)
    first.train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "adapter_model.safetensors").exists()
    resumed = build_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    expected = {name: value for name, value in whole.model.named_parameters() if value.requires_grad}
    actual = dict(resumed.model.named_parameters())
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, tmp_path):
    """With frozen embeddings, too, whose output has no gradient to start from."""
    options = {"lora": {"modules_to_save": None}, "max_steps": 2}
    plain = build_trainer(tmp_path / "plain", **options)
    plain.train()
    checkpointed = build_trainer(
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **options,
    )
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(plain)[0] != losses(plain)[1]


def test_push_to_hub_uploads_adapters_processor_and_card(tmp_path, monkeypatch):
    uploads = []

    def upload_folder(*args, **kwargs):
        folder = Path(kwargs["folder_path"])
        uploads.append({**kwargs, "files": {path.name for path in folder.iterdir() if path.is_file()}})

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="user/lavit-shapes")

    for function in (upload_folder, create_repo):
        monkeypatch.setattr(HfApi, function.__name__, function)
        monkeypatch.setattr(f"transformers.trainer.{function.__name__}", function, raising=False)  # before 5.23
    trainer = build_trainer(
        tmp_path / "run", max_steps=1, push_to_hub=True, hub_model_id="user/lavit-shapes", hub_strategy="end"
    )
    trainer.train()
    trainer.push_to_hub(dataset_tags="shapes", tasks="image-text-to-text")
    (upload,) = uploads
    assert upload["repo_id"] == "user/lavit-shapes"
    expected = {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert expected <= upload["files"] and "model.safetensors" not in upload["files"]
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == str(CHECKPOINT)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(CHECKPOINT) and config["task_type"] == "CAUSAL_LM"


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


@pytest.mark.xfail(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    raises=ValueError,
    strict=True,
    reason="transformers 5.24 asks for PEFT 0.22, which was not released on the day that it came",
)
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


WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: Path, base: Path = CHECKPOINT, seed: int = 0, **options) -> Path:
    """Adapters that change something, as if they were trained."""
    model = LavitForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, get_lora_config(model, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("lora") / "lora")


def logits_of_codes(model) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 300, 302, 340, 301, 9]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def test_merged_is_adapted(adapter: Path, tmp_path: Path) -> None:
    folder = merge_adapter(adapter, tmp_path / "merged")
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    expected, plain = (
        logits_of_codes(PeftModel.from_pretrained(base, adapter)),
        logits_of_codes(LavitForConditionalGeneration.from_pretrained(CHECKPOINT)),
    )
    pipeline = LavitTextToImagePipeline.from_pretrained(folder)
    torch.testing.assert_close(logits_of_codes(pipeline.model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1
    assert (folder / "lowres" / "model_index.json").is_file()
    assert (folder / "NOTICE").read_bytes() == (CHECKPOINT / "NOTICE").read_bytes()
    assert ImageTextProcessor.from_pretrained(folder).image_token
    card = ModelCard.load(folder / "README.md")
    assert "lavit merge" in card.text and "random-weights" in card.data.tags and card.data.base_model is None
    assert str(CHECKPOINT.parent) not in card.content


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_as_the_base_is(tmp_path: Path, dtype: torch.dtype) -> None:
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    ImageTextProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "base")
    folder = merge_adapter(save_adapter(tmp_path / "lora", tmp_path / "base"), tmp_path / "merged")
    stored, expected = (load_file(root / "model.safetensors") for root in (folder, tmp_path / "base"))
    assert {name: value.dtype for name, value in stored.items()} == {n: v.dtype for n, v in expected.items()}
    assert LavitForConditionalGeneration.from_pretrained(folder).dtype == dtype


def test_a_base_that_loads_in_another_dtype_than_it_is_stored_in(tmp_path: Path) -> None:
    base = Path(default_checkpoint())  # half precision that loads as float32
    folder = merge_adapter(save_adapter(tmp_path / "lora", base, modules_to_save=None), tmp_path / "merged")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    merged = LavitForConditionalGeneration.from_pretrained(folder)
    assert merged.dtype == torch.float32
    assert merged.generation_config.drawing_guidance_scale == 1.5


def test_what_else_is_adapted(tmp_path: Path) -> None:
    for number, options in enumerate(({"use_dora": True}, {"use_rslora": True, "modules_to_save": None})):
        adapter = save_adapter(tmp_path / f"{number}", **options)
        base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
        expected = logits_of_codes(PeftModel.from_pretrained(base, adapter))
        merged = apply_adapter(LavitForConditionalGeneration.from_pretrained(CHECKPOINT), find_adapter(adapter))
        torch.testing.assert_close(logits_of_codes(merged), expected, atol=1e-4, rtol=1e-4)


def test_where_base_and_processor_are(adapter: Path, tmp_path: Path) -> None:
    found = find_adapter(adapter)
    assert found.base == found.processor == str(CHECKPOINT) and not found.touches_visual_tokenizer
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    ImageTextProcessor.from_pretrained(CHECKPOINT).save_pretrained(moved)
    assert find_adapter(moved).processor == str(moved)
    assert find_adapter(adapter, "user/base").base == "user/base"
    assert find_adapter(CHECKPOINT) is None
    everywhere = save_adapter(
        tmp_path / "all", exclude_modules=None, target_modules=r".*(q_proj|merger.*fc1)", modules_to_save=None
    )
    assert find_adapter(everywhere).touches_visual_tokenizer


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_config(**values):
    return lambda folder: change_json(folder / "adapter_config.json", **values)


def change_weights(change) -> object:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def drop_one(weights) -> None:
    del weights[min(name for name in weights if "lora_A" in name)]


def add_one(weights) -> None:
    weights["base_model.model.nothing.lora_A.weight"] = torch.zeros(2)


def reshape_one(weights) -> None:
    name = min(name for name in weights if "lora_A" in name)
    weights[name] = weights[name][:, :-1].contiguous()


def spoil_one(weights) -> None:
    weights[min(name for name in weights if "lora_B" in name)].fill_(float("nan"))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_config(base_model_name_or_path=None), "names no base model; name it: lavit merge"),
        (change_config(base_model_name_or_path="/gone/lavit"), "adapters of /gone/lavit, which does not exist here"),
        (change_config(base_model_name_or_path=str(CHECKPOINT / "unet")), "unet, which is no LaVIT checkpoint"),
        (change_config(base_model_name_or_path=str(CHECKPOINT.parent)), "which is no LaVIT checkpoint"),
        (change_config(peft_type="IA3"), "is not of LoRA, but of 'IA3'"),
        (change_config(megatron_config={"a": 1}, megatron_core="os"), "a model of Megatron"),
        (change_config(target_modules=["nothing_like_it"], modules_to_save=None), "does not fit"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            "is not readable as JSON",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "does not hold a JSON object"),
        (pickle_weights, "has no adapter_model.safetensors: adapters are read from safetensors only"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"broken"), "not a readable safetensors file"),
        (change_weights(drop_one), "it lacks 1 tensors"),
        (change_weights(add_one), "it has 1 tensors"),
        (change_weights(reshape_one), "does not fit"),
        (change_weights(spoil_one), "does not fit"),
    ],
)
def test_adapters_that_cannot_be_used(adapter: Path, tmp_path: Path, damage, message: str) -> None:
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    damage(broken)
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_adapter(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [broken]


def test_wrong_kinds_of_directories(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters of LoRA: it has no adapter_config.json"):
        merge_adapter(CHECKPOINT, tmp_path / "out")
    with pytest.raises(ValueError, match="holds adapters itself; merge these first"):
        merge_adapter(adapter, tmp_path / "out", base=adapter)
    with pytest.raises(ConversionError, match="exists and is not empty"):
        merge_adapter(adapter, adapter)
    other = Path(default_checkpoint())
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(adapter, tmp_path / "out", base=other)
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="not of LoRA"):
        merge_adapter(tmp_path / "ia3", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_lacks_tensors(adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(CHECKPOINT, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing, the first is model\.language_model\.norm\.weight"):
        merge_adapter(adapter, tmp_path / "out", base=base)
    assert list(tmp_path.iterdir()) == [base]


def test_adapters_of_a_repository(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(adapter)

    config = str(adapter / "adapter_config.json")
    monkeypatch.setattr(adapters, "find_adapter_config_file", lambda source: config if source == "user/lora" else None)
    monkeypatch.setattr(adapters, "snapshot_download", download)
    assert find_adapter("user/lora") == adapters.Adapter(adapter, str(CHECKPOINT))
    assert asked == [("user/lora", ["adapter_*", "*.json", "*.jinja"])]  # no pickles, no code
    assert find_adapter("user/other") is None


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_failure_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    def fail(*args, **kwargs) -> None:
        raise error

    monkeypatch.setattr(ImageTextProcessor, "save_pretrained", fail)
    with pytest.raises(ConversionError, match="No space left on device"):
        merge_adapter(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE"])
def test_files_of_others_are_not_merged(adapter: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    base = Path(shutil.copytree(CHECKPOINT, tmp_path / "base"))
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"has {name}, which links to .*secret outside of it: put a copy"):
        merge_adapter(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_the_card_of_adapters_names_no_path(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    assert str(CHECKPOINT) in (folder / "README.md").read_text(), "the form that peft writes"
    save_adapter_card(folder, str(CHECKPOINT))
    card = ModelCard.load(folder / "README.md")
    assert str(CHECKPOINT) not in card.content and card.data.base_model is None and card.data.library_name == "peft"
    save_adapter_card(folder, "user/lavit")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "user/lavit" and 'from_pretrained("user/lavit")' in card.text
