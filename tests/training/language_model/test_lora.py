"""LoRA on a LaVIT: what is adapted, training by plain `Trainer`, saving, merging, pushing and drawing."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.dataset import EpochCallback, TrainingDataset
from lavit_hf.training.language_model.adapters import get_lora_config
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_models import random_pixels, spread_selector
from tiny_parts import CHECKPOINT, CODES, build_text_model, build_vision_model, picture_rows

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def build_model(model_type: str = "llama") -> LavitForConditionalGeneration:
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
    model = get_peft_model(build_model(), get_lora_config())
    layers = {f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in LLAMA_LINEARS}
    assert adapted_modules(model) == {*layers, "model.multi_modal_projector"}
    assert trained_copies(model) == {
        "model.language_model.embed_tokens.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.weight",
    }


def test_plain_all_linear_would_adapt_the_visual_tokenizer():
    model = get_peft_model(build_model(), LoraConfig(target_modules="all-linear"))
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
    model = build_model(model_type)
    adapted = get_peft_model(model, get_lora_config(model))
    # Trained once, and still tied.
    assert trained_copies(adapted) == {f"model.language_model.{embeddings}.modules_to_save.default.weight"}
    assert adapted.get_input_embeddings().weight is adapted.get_output_embeddings().weight
    inside = {name.split(".", 4)[-1] for name in adapted_modules(adapted) if "projector" not in name}
    assert inside == linears


def test_values_can_be_replaced():
    config = get_lora_config(build_model("gemma"), r=4, modules_to_save=None)
    assert (config.r, config.lora_alpha, config.modules_to_save, config.ensure_weight_tying) == (4, 32, None, False)
    model = get_peft_model(build_model(), get_lora_config(exclude_modules=r".*(visual_tokenizer|projector).*"))
    assert not any("projector" in name for name in adapted_modules(model))


def test_gradients_reach_adapters_embeddings_head_and_nothing_else():
    model = build_model()
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
    build_model(request.param).save_pretrained(root / "base")
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
