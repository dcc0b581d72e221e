"""Adapters are published with a card that says what they are, and whose code runs without this package."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from hub.hub_server import HubServer
from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.hub import PublishError, publish
from lavit_hf.hub.card import Origin
from lavit_hf.hub.publish import prepare
from lavit_hf.training import get_lora_config

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """What `Trainer` saves of a model of `get_peft_model`."""
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    adapted = get_peft_model(model, get_lora_config(model, r=4, modules_to_save=None, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ImageTextProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / "training_args.bin")
    return tmp_path / "adapter"


def test_the_card_says_what_it_is_and_names_no_path(adapter: Path, tiny_checkpoint: Path) -> None:
    assert str(tiny_checkpoint) in (adapter / "README.md").read_text()  # by PEFT
    with prepare(adapter, "owner/adapter", Origin(base_models=["owner/tiny"])) as publication:
        card = ModelCard(publication.card)
        config = json.loads(publication.files["adapter_config.json"].read_text())
    assert "training_args.bin" not in publication.files and "adapter_model.safetensors" in publication.files
    assert str(tiny_checkpoint.parent) not in str(card)
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert (card.data.base_model, card.data.library_name) == ("owner/tiny", "peft")
    assert card.data.pipeline_tag == "image-text-to-text" and {"lavit", "lora"} <= set(card.data.tags)
    assert "Model Card for Model ID" not in card.text and "More Information Needed" not in card.text
    assert "fine-tuning changed of [owner/tiny](https://huggingface.co/owner/tiny)" in card.text
    assert "| Kind | LORA, of PEFT |" in card.text and "| Rank | 4 |" in card.text
    assert "| Parameters, adapter | " in card.text and "Language model" not in card.text


def test_a_base_that_only_this_machine_has_is_refused(adapter: Path) -> None:
    with pytest.raises(PublishError, match=r"adapter_config\.json names no model on the Hub.*--base-model"):
        publish(adapter, "owner/adapter", dry_run=True)


def test_a_base_on_the_hub_is_known(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "owner/tiny"}))
    (adapter / "README.md").write_text("# Mine\n\nMy words.\n")
    card = publish(adapter, "owner/adapter", dry_run=True).card
    assert 'from_pretrained("owner/tiny", trust' in card and "My words." in card


def test_without_a_processor_that_of_the_base_is_used(adapter: Path) -> None:
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (adapter / name).unlink()
    card = publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"]).card
    assert 'AutoProcessor.from_pretrained("owner/tiny"' in card
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(PublishError, match=r"has no processor_config\.json"):
        publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", "[]"),
        ("adapter_config.json", '{"peft_type": 1}'),
        ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": ["a"]}'),
        ("adapter_config.json", '{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "os"}'),
        ("adapter_config.json", '{"peft_type": "LORA", "target_modules": {"a": "b"}}'),
        ("adapter_model.safetensors", "x"),
    ],
)
def test_malformed_files_are_named(adapter: Path, name: str, content: str) -> None:
    (adapter / name).write_text(content)
    with pytest.raises(PublishError, match=name):
        publish(adapter, "owner/adapter", dry_run=True, base_models=["owner/tiny"])


def test_the_code_of_the_card_runs(hub: HubServer, client, adapter: Path, tiny_checkpoint: Path, tmp_path) -> None:
    with prepare(tiny_checkpoint, "owner/tiny", Origin()) as publication:
        hub.add("owner/tiny", publication.files)
    with prepare(adapter, "owner/adapter", Origin(base_models=["owner/tiny"])) as publication:
        hub.add("owner/adapter", publication.files)
        card = publication.card
    code = card.split("```python\n")[1].partition("```")[0].replace("max_new_tokens=10", "max_new_tokens=4")
    shutil.copyfile(PICTURE, tmp_path / "picture.png")
    printed = client(f"{code}\nimport torch\ntorch.save(output, 'output.pt')").stdout
    assert printed
    base = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = ImageTextProcessor.from_pretrained(tiny_checkpoint)
    inputs = processor(images=str(PICTURE), text="<image>Question: What is this? Answer:", return_tensors="pt")
    expected = PeftModel.from_pretrained(base, adapter).generate(
        **inputs, num_beams=5, length_penalty=0.0, max_new_tokens=4
    )
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)
