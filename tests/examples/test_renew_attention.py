"""A trained LaVIT gets new attention in its language model, and keeps all else."""

import importlib
from pathlib import Path

import pytest
import torch

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "lavit-tiny-random"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "worlds")
    return importlib.import_module("renew_attention")


def test_attention_alone_is_new(example, tmp_path: Path) -> None:
    out = tmp_path / "renewed"
    example.main(["--model", str(TINY), "--output_dir", str(out)])
    before = LavitForConditionalGeneration.from_pretrained(TINY)
    after = LavitForConditionalGeneration.from_pretrained(out).state_dict()
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    attention = {
        f"model.language_model.layers.{layer}.self_attn.{name}_proj.weight"
        for layer in range(before.config.text_config.num_hidden_layers)
        for name in "qkvo"
    }
    assert changed == attention
    spread = torch.cat([after[name].flatten() for name in attention]).std().item()
    assert spread == pytest.approx(before.config.text_config.initializer_range, rel=0.1)
    assert len(ImageTextProcessor.from_pretrained(out).tokenizer) == before.config.text_config.vocab_size


def test_the_seed_decides(example, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        example.main(["--model", str(TINY), "--output_dir", str(tmp_path / name), "--seed", str(seed)])
        model = LavitForConditionalGeneration.from_pretrained(tmp_path / name)
        weights.append(model.model.language_model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_models_whose_attention_has_another_name_are_refused(example) -> None:
    model = LavitForConditionalGeneration.from_pretrained(TINY)
    for layer in model.model.language_model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(SystemExit, match="no linear layers in modules called self_attn"):
        example.renew_attention(model)
