"""`lavit merge`, and adapters as `--model` of every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.data.scenes import make_scenes
from lavit_hf.training import get_lora_config

STEPS = ["--steps", 2, "--seed", 0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Path) -> Path:
    """Adapters that write other texts and draw other pictures than their base; no processor beside them."""
    folder = tmp_path_factory.mktemp("lora") / "lora"
    model = LavitForConditionalGeneration.from_pretrained(random_checkpoint)
    adapted = get_peft_model(model, get_lora_config(model, modules_to_save=None))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder)
    return folder


def test_every_command_takes_adapters(
    lavit, photo: Path, random_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    """They say and draw what the merged checkpoint does."""
    merged = tmp_path / "merged"
    result = lavit("merge", adapter, merged)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {merged}. Try it: lavit caption IMAGE --model {merged}\n" and result.stderr == ""
    make_scenes(num_scenes=3).select_columns(["image", "text"]).save_to_disk(tmp_path / "data")
    said = {}
    for name, model in (("base", random_checkpoint), ("adapter", adapter), ("merged", merged)):
        folder = tmp_path / name / "out"
        outputs = [
            lavit("caption", photo, "-m", model),
            lavit("ask", photo, "What is this?", "-m", model),
            lavit("draw", "a cat", "-m", model, "-o", folder / "a.png", *STEPS),
            lavit("reconstruct", photo, "-m", model, "-o", folder / "b.png", *STEPS),
            lavit("demo", "-i", photo, "-m", model, "-o", folder / "c.png"),
            lavit("tokenize", tmp_path / "data", folder / "codes", "-m", model),
            lavit("evaluate", model, "-t", "caption", "--data", "scenes", "--num-samples", 2, "-o", folder / "scores"),
        ]
        assert [result.exit_code for result in outputs] == [0] * len(outputs), [r.stderr for r in outputs]
        predictions = folder / "scores" / "caption" / "validation" / "predictions.jsonl"
        said[name] = [
            outputs[0].stdout,
            outputs[1].stdout,
            *((folder / file).read_bytes() for file in ("a.png", "b.png", "c.png")),
            predictions.read_text(),
        ]
    assert said["adapter"] == said["merged"]
    assert said["adapter"][0] != said["base"][0] and said["adapter"][2] != said["base"][2]
    assert said["adapter"][3] == said["base"][3], "the visual tokenizer is that of the base"
    codes = [
        json.loads((tmp_path / name / "out/codes/tokenization.json").read_text()) for name in said if name != "merged"
    ]
    assert codes[0]["codebook_fingerprint"] == codes[1]["codebook_fingerprint"]


def test_a_base_that_is_not_there(lavit, photo: Path, random_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/lavit"}))
    for command in (["caption", photo, "-m", moved], ["merge", moved, tmp_path / "out"]):
        result = lavit(*command)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert (
            f"{moved} holds adapters of /gone/lavit, which does not exist here; name it: lavit merge" in result.stderr
        )
    assert not (tmp_path / "out").exists()
    result = lavit("merge", moved, tmp_path / "out", "--base", random_checkpoint, "--max-shard-size", "200KB")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    result = lavit("merge", moved, tmp_path / "again", "--base", tmp_path / "nowhere")
    assert result.exit_code == 1 and "nowhere does not exist" in result.stderr
    result = lavit("caption", photo, "-m", save_beside(moved, random_checkpoint))
    assert "holds adapters of LoRA beside a model" in result.stderr


def save_beside(adapter: Path, checkpoint: Path) -> Path:
    shutil.copy(checkpoint / "config.json", adapter)
    return adapter
