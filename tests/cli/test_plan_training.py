"""`lavit plan-training`."""

from pathlib import Path

import pytest

from lavit_cli.plan_training import GpuName, Stage, read_number
from lavit_hf.training import planning
from tiny_parts import text_config, vision_config


@pytest.fixture
def parts(tmp_path: Path) -> list[object]:
    """A small vision encoder and language model, of which a plan needs the configurations."""
    vision_config().save_pretrained(tmp_path / "vision")
    text_config().save_pretrained(tmp_path / "text")
    return ["--vision-model", tmp_path / "vision", "--text-model", tmp_path / "text"]


def test_names_are_those_that_can_be_planned():
    assert [stage.value for stage in Stage] == list(planning.STAGES)
    assert [gpu.value for gpu in GpuName] == list(planning.GPUS)


def test_it_prints_what_a_training_takes(lavit, parts) -> None:
    result = lavit("plan-training", "stage2", "--gpus", 8, "--gpu", "h100", "--pairs", "10M", "--price", 2, *parts)
    assert result.exit_code == 0, result.output
    for text in ("10,000,000 pairs on 8 x h100 (sharded)", "tokens/s", "GPU-hours", "cost", "GiB per GPU: weights"):
        assert text in result.stdout
    assert "measured with LoRA at 7B on one H200" in result.stdout and "costs $2.00" in result.stdout


def test_a_recipe_says_how_much_and_in_which_batches(lavit, parts, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 10\nper_device_train_batch_size: 3\ngradient_accumulation_steps: 1\n")
    result = lavit("plan-training", "stage1", "--config", path, "--gpus", 2, "--peak-share", 0.5, *parts)
    assert result.exit_code == 0, result.output
    assert "60 pictures on 2 x h100 (a copy on each)" in result.stdout and "10 updates" in result.stdout
    assert "50% of 989 TFLOP/s, as you say" in result.stdout
    assert "Warning: 10 updates are few" in result.stdout


def test_7b_with_all_weights_does_not_fit_a_small_gpu(lavit) -> None:
    result = lavit("plan-training", "stage2", "--gpus", 1, "--gpu", "rtx4090", "--pairs", "1k")
    assert result.exit_code == 0, result.output
    assert "Warning: It does not fit: " in result.stdout and "--shard" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage2"], "--pairs says how many"),
        (["stage2", "--pairs", "10X"], "--pairs takes a number above 0, perhaps with k, M or B; got '10X'"),
        (["stage2", "--pairs", "0"], "--pairs takes a number above 0"),
        (["stage1", "--pairs", "1k", "--shard"], "stage1 does not shard"),
        (["stage1", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_one_line_about_what_is_wrong(lavit, arguments, message) -> None:
    result = lavit("plan-training", *arguments)
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_recipes_of_something_else(lavit, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    result = lavit("plan-training", "stage1", "--config", tmp_path / "list.yaml")
    assert result.exit_code == 1 and "list.yaml has to hold a YAML mapping" in result.stderr


def test_numbers():
    assert [read_number(text) for text in ("500", "10k", "1.5M", "2B")] == [500, 10_000, 1_500_000, 2 * 10**9]
