"""Saved adapters of LoRA: found with their base, merged into it, and whatever is wrong with them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, default_checkpoint
from lavit_hf.conversion.weight_files import ConversionError
from lavit_hf.pipelines import LavitTextToImagePipeline
from lavit_hf.training import get_lora_config, merge_adapter
from lavit_hf.training.language_model.adapters import apply_adapter, find_adapter, save_adapter_card
from tiny_parts import CHECKPOINT

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


def logits(model) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 300, 302, 340, 301, 9]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def test_merged_is_adapted(adapter: Path, tmp_path: Path) -> None:
    folder = merge_adapter(adapter, tmp_path / "merged")
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    expected, plain = (
        logits(PeftModel.from_pretrained(base, adapter)),
        logits(LavitForConditionalGeneration.from_pretrained(CHECKPOINT)),
    )
    pipeline = LavitTextToImagePipeline.from_pretrained(folder)
    torch.testing.assert_close(logits(pipeline.model), expected, atol=1e-4, rtol=1e-4)
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
        expected = logits(PeftModel.from_pretrained(base, adapter))
        merged = apply_adapter(LavitForConditionalGeneration.from_pretrained(CHECKPOINT), find_adapter(adapter))
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


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
