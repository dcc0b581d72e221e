"""The recipes of all worlds, with a few steps per stage: every script runs, and together they make a checkpoint."""

import contextlib
import importlib
import json
import shutil
import signal
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from PIL import Image

from lavit_hf import LavitTextToImagePipeline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
UNET = {"attention_head_dim": 8, "norm_num_groups": 4, "cross_attention_dim": 16}
# What makes a stage small, beside the sizes of its networks.
_ENCODER = {"max_steps": 2, "num_scenes": 8, "num_eval_scenes": 4, "per_device_train_batch_size": 4}
_TOKENIZER = {
    "max_steps": 6,
    "num_scenes": 8,
    "per_device_train_batch_size": 4,
    "codebook_size": 16,
    "num_layers": 1,
    "cross_attention_dims": 16,
    "bypass_merger_steps": 1,
}
_AUTOENCODER = {"max_steps": 2, "num_scenes": 8, "per_device_train_batch_size": 4, "num_validation_rows": 4}
_SELECTOR = {**_TOKENIZER, "selector_steps": 1, "warmup_steps": 1}
_PIXEL_DECODER = {
    "max_steps": 2,
    "num_scenes": 8,
    "per_device_train_batch_size": 4,
    "num_validation_rows": 4,
    "num_validation_images": 1,
    "validation_inference_steps": 2,
}
FEW: dict[str, dict[str, Any]] = {
    "shape_encoder": _ENCODER,
    "random_patches": _SELECTOR,
    "selector": _SELECTOR,
    "vision_encoder": _ENCODER,
    "carried": {"max_steps": 2, "batch_size": 4},
    "autoencoder": _AUTOENCODER,
    "autoencoder_longer": _AUTOENCODER,
    "tokenizer": {**_TOKENIZER, "num_eval_rows": 4, "kmeans_tokens_per_code": 1, "quantize_after_steps": 2},
    "pairs": {"num_rows": 24, "num_validation_rows": 4},
    "small_pairs": {"num_rows": 24, "num_validation_rows": 4},
    "tokenizer_longer": {"max_steps": 2, "per_device_train_batch_size": 4, "num_eval_rows": 4},
    "dataset_listing": {"num_rows": 24},
    "lavit_listing": {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1},
    "dataset_drawing": {"num_rows": 24},
    "lavit_drawing": {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1},
    "dataset": {"num_rows": 24},
    "lavit": {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1},
    "drawings": {"num_rows": 24, "num_validation_rows": 4},
    "better_drawings": {"num_rows": 24, "num_validation_rows": 4},
    "pixel_decoder": _PIXEL_DECODER,
    "pixel_decoder_longer": _PIXEL_DECODER,
}


@pytest.fixture(params=["lavit_scenes/recipe", "lavit_emoji/recipe", "lavit_emoji/small"])
def small_recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The real recipe with other sizes."""
    original = EXAMPLES / f"{request.param}.yaml"
    recipe = yaml.safe_load(original.read_text())
    sizes = {
        ("shape_encoder", "vision_config"): VISION,
        ("vision_encoder", "vision_config"): VISION,
        ("language_model", "config"): TEXT,
        ("pixel_decoder", "unet_config"): UNET,
    }
    for (stage, option), changes in sizes.items():
        config = json.loads(Path(recipe[stage]["options"][option].format(here=original.parent)).read_text())
        if "block_out_channels" in config:
            changes = {**changes, "block_out_channels": [16] * len(config["block_out_channels"])}
        recipe[stage]["options"][option] = str(tmp_path / f"{stage}.json")
        (tmp_path / f"{stage}.json").write_text(json.dumps({**config, **changes}))
    vae_config = recipe["autoencoder"]["options"]["vae_config"]
    recipe["autoencoder"]["options"]["vae_config"] = vae_config.format(here=original.parent)
    for stage in recipe.keys() - {"language_model"}:
        recipe[stage]["options"].update(FEW[stage])
    if "emoji" in request.param:  # a selector that has hardly learned drops everything
        recipe["selector"]["options"].update(keep_rate=0.9, learning_rate=0.02, selector_steps=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(name: str, *arguments: Any) -> None:
    importlib.import_module(f"worlds.{name}").main([str(argument) for argument in arguments])


def run_here(command: list[str], log: IO[str]) -> int:
    """A stage without a process of its own, in which it would mostly import."""
    _, script, *arguments = command
    module = Path(script).relative_to(EXAMPLES).with_suffix("").as_posix().replace("/", ".")
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        importlib.import_module(module).main(arguments)
    return 0


def test_the_recipe_makes_a_checkpoint(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "emoji" in small_recipe.read_text():  # those of the other one are processes, as of users
        monkeypatch.setattr(importlib.import_module("worlds.train"), "run_process", run_here)
    trained, checkpoint = tmp_path / "trained", tmp_path / "checkpoint"
    run("train", "--output_dir", trained, "--recipe", small_recipe)
    logs = "\n".join(path.read_text() for path in trained.glob("*.log"))
    assert (trained / "pixel_decoder" / "finished.yaml").is_file(), logs

    capsys.readouterr()
    run("train", "--output_dir", trained, "--recipe", small_recipe)
    recipe = yaml.safe_load(small_recipe.read_text())
    assert capsys.readouterr().out.count("finished before") == len(recipe)

    done = yaml.safe_load((trained / "lavit" / "finished.yaml").read_text())
    assert sorted(done["made_from"]) == ["dataset", "lavit_drawing"]
    recipe["lavit"]["options"]["max_steps"] = 3
    small_recipe.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit, match="lavit finished before with other options"):
        run("train", "--output_dir", trained, "--recipe", small_recipe, "--only", "lavit")

    run("assemble", "--trained", trained, "--output_dir", checkpoint)
    assert not any(str(tmp_path) in path.read_text() for path in checkpoint.rglob("config.json"))
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    side, thing = (96, "cat") if "emoji" in small_recipe.read_text() else (64, "red square")
    (drawing,) = pipeline(f"a small {thing} on a white background", num_inference_steps=2).images
    assert isinstance(drawing, Image.Image) and drawing.size == (side, side)


def test_what_was_made_from_an_earlier_stage_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    copy = {"script": "copy.py", "options": {"source": "{out}/first"}}
    recipe.write_text(yaml.safe_dump({"first": {"script": "copy.py"}, "second": copy}, sort_keys=False))
    train = importlib.import_module("worlds.train")
    monkeypatch.setattr(train, "run_process", lambda *args: 0)
    run("train", "--output_dir", out, "--recipe", recipe)
    run("train", "--output_dir", out, "--recipe", recipe)
    shutil.rmtree(out / "first")
    with pytest.raises(SystemExit, match="second finished before with other options, or from other stages"):
        run("train", "--output_dir", out, "--recipe", recipe)
    shutil.rmtree(out / "second")
    run("train", "--output_dir", out, "--recipe", recipe)


def test_a_stage_that_fails_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"dataset": {"script": "worlds/make_dataset.py", "options": {"what": 1}}}))
    with pytest.raises(SystemExit, match=r"dataset failed with exit status .*dataset\.log"):
        run("train", "--output_dir", tmp_path / "out", "--recipe", recipe)
    assert "--what" in (tmp_path / "out" / "dataset.log").read_text()


def test_sigterm_reaches_the_stage_which_is_not_finished_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it went on without train.py, and a second run began to write beside it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    train = importlib.import_module("worlds.train")
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*args):\n"
        "    pathlib.Path(sys.argv[2], 'saved').touch()\n"
        "    sys.exit(0)\n"  # as scripts here do
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(train, "EXAMPLES", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="first was stopped by SIGTERM.*The same command goes on"):
        train.run_stage("first", {"script": "stage.py"}, tmp_path / "out", tmp_path)
    assert (tmp_path / "out/first/saved").exists() and not (tmp_path / "out/first/finished.yaml").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    # The script alone gets the signal.
    stage.write_text("import pathlib, sys; pathlib.Path(sys.argv[2], 'checkpoint-3').mkdir(exist_ok=True)")
    with pytest.raises(SystemExit, match="first was stopped by SIGTERM"):
        train.run_stage("first", {"script": "stage.py"}, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out/first/finished.yaml").exists()
    stage.write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="first failed with exit status 3"):
        train.run_stage("first", {"script": "stage.py"}, tmp_path / "out", tmp_path)
