"""Sharded training on two CPU processes equals unsharded training.

accelerate itself shards on accelerators only, and falls back silently. Tested here are torch's own `fully_shard`, and
what accelerate would call with the configuration file of the examples.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lavit_hf import LavitForConditionalGeneration
from tiny_parts import CHECKPOINT

ROOT = Path(__file__).parents[2]
CONFIG_FILE = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
WAYS = ["fully_shard", "accelerate", "lora"]


@pytest.fixture(scope="module")
def folder(python, tmp_path_factory) -> Path:
    """What `sharded_training.py` leaves."""
    path = tmp_path_factory.mktemp("sharded")
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).parent / "sharded_training.py"
    result = subprocess.run(
        [*command, str(script), str(CHECKPOINT), str(path), str(CONFIG_FILE)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def whole(way: str) -> str:
    return "lora_whole" if way == "lora" else "whole"


@pytest.mark.parametrize("way", ["fully_shard", "lora"])
def test_every_parameter_is_sharded(results, way):
    assert results[way]["whole"] == []
    count = len(list(LavitForConditionalGeneration.from_pretrained(CHECKPOINT).parameters()))
    adapters = 2 * (2 * 7 + 1) + 2  # for 7 linears in each of 2 layers, and the projection; embeddings and head
    assert len(results[way]["sharded"]) == count + (adapters if way == "lora" else 0)


def test_accelerates_configuration_leaves_selectors_and_codebook_whole(results):
    parts = results["accelerate"]
    assert parts["whole"] and all(".selector." in name or ".quantizer." in name for name in parts["whole"])
    assert not any(".selector." in name or ".quantizer." in name for name in parts["sharded"])
    # Under mixed precision, they alone compute in fp32, so that the same patches are kept as ever.
    for name, dtype in results["bf16"].items():
        assert dtype == ("torch.float32" if "selector" in name else "torch.bfloat16"), name


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_process(results, way):
    expected = results[whole(way)]["losses"]
    assert expected[0] > expected[1] > expected[2]
    assert results[way]["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_sharded_models_draw_and_generate(results, way):
    expected = results[whole(way)]
    assert results[way]["drawing"] == pytest.approx(expected["drawing"], abs=1e-4)
    assert results[way]["text"] == expected["text"]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_loads_unsharded(folder, way):
    name = "adapter_model.safetensors" if way == "lora" else "model.safetensors"
    actual, expected = load_file(folder / way / name), load_file(folder / whole(way) / name)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # AdamW makes steps of up to 1e-3 of what is rounding alone, where a gradient should be zero.
        torch.testing.assert_close(actual[key], value, atol=5e-4, rtol=1e-4)
    if way == "lora":
        model = PeftModel.from_pretrained(LavitForConditionalGeneration.from_pretrained(CHECKPOINT), folder / way)
    else:
        model, info = LavitForConditionalGeneration.from_pretrained(folder / way, output_loading_info=True)
        assert not info["missing_keys"]
    ids = torch.tensor([[5, 6, model.config.boi_token_id]])
    part = (model.config.eoi_token_id, model.config.text_config.vocab_size)
    logits = model.eval()(input_ids=ids, vocab_slice=part).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(json.loads((folder / "results.json").read_text())[way]["drawing"]))
