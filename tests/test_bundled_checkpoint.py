"""The checkpoint that comes with the package: it is complete and small, and it sees and draws."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from lavit_hf import LavitTextToImagePipeline, default_checkpoint
from lavit_hf.data.scenes import PortableRng
from lavit_hf.hub.facts import world_of

CHECKPOINT = Path(default_checkpoint())
WORLD = world_of(default_checkpoint())
NUM_SCENES = 24


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor(model):
    return AutoProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model.visual_tokenizer)


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 45e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md"}


def test_weights_are_half_but_load_as_float32(model) -> None:
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}
    assert model.dtype == torch.float32


def test_the_card_has_the_numbers_that_were_measured() -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    for result in json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))["results"]:
        for name, found in result["metrics"].items():
            value = f"{100 * found['value']:.1f} %" if found["is_share"] else f"{found['value']:.3f}"
            assert f"| {result['task']} | {WORLD.name} {result['split']} | {name} | {value}" in card


def test_captions_of_new_scenes_are_right_as_often_as_the_card_says(model, processor) -> None:
    scenes = [WORLD.sample_scene("validation", 7, index) for index in range(NUM_SCENES)]
    inputs = processor(
        images=[WORLD.render(scene) for scene in scenes],
        text=["<image>"] * NUM_SCENES,
        padding=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=64)
    captions = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        WORLD.parse_caption(caption.strip()) == WORLD.facts_of(scene)
        for caption, scene in zip(captions, scenes, strict=True)
    ]
    results = json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))["results"]
    (of_captions,) = (one for one in results if (one["task"], one["split"]) == ("caption", "validation"))
    measured = of_captions["metrics"]["fully_right"]["value"]
    assert abs(sum(right) / NUM_SCENES - measured) < 0.2, captions  # two deviations of so few scenes


def test_drawings_have_the_background_that_was_asked_for(model, processor) -> None:
    pipeline = LavitTextToImagePipeline.from_pretrained(CHECKPOINT, model=model, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [WORLD.sample_scene("validation", 7, index) for index in range(8)]
    generators = [torch.Generator().manual_seed(index) for index in range(len(scenes))]
    prompts = [WORLD.write_caption(scene, PortableRng(0, index)) for index, scene in enumerate(scenes)]
    drawings = pipeline(prompts, num_inference_steps=20, generator=generators).images
    found = [WORLD.judge(drawing) for drawing in drawings]
    assert sum(one.background == scene.background for one, scene in zip(found, scenes, strict=True)) >= 6


def test_a_missing_checkpoint_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(default_checkpoint.__globals__, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="Install lavit-hf again"):
        default_checkpoint()
