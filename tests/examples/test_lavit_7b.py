"""The recipes at full size: every value is an option and says where it is from, plans fit, and small runs run."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, SiglipVisionConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from lavit_hf import LavitForConditionalGeneration, LavitVisualTokenizer
from lavit_hf.training import plan_training, read_recipe
from lavit_hf.training.planning import CHOICES, DEFAULTS
from tiny_models import build_visual_tokenizer
from tiny_parts import CHECKPOINT, save_dual, save_text
from tiny_pixel_decoders import build_token_decoder, build_vae, share_codes, unet_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDER = EXAMPLES / "lavit_7b"
SCRIPTS = {
    "stage1": "train_tokenizer",
    "stage2": "train_lm",
    "stage3": "train_pixel_decoder",
    "lora": "finetune_lora",
    "qlora": "finetune_lora",
    "modern_stage1": "train_tokenizer",
    "modern_stage2": "train_lm",
}
STAGES = {name: name.removeprefix("modern_").replace("qlora", "lora") for name in SCRIPTS}
SIGLIP2 = SiglipVisionConfig(  # google/siglip2-so400m-patch14-224
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
MODERN = {"vision_config": SIGLIP2, "text_config": AutoConfig.for_model("smollm3")}  # its defaults are of SmolLM3-3B
# GPUs that a recipe is for; billions of weights, and of those that learn.
PLANS = {
    "stage1": (8, "h100", 1.83, 0.81),
    "stage2": (8, "h100", 8.70, 7.28),
    "stage3": (8, "h100", 4.48, 2.58),
    "lora": (1, "a100-40gb", 8.74, 0.04),
    "qlora": (1, "rtx4090", 8.86, 0.16),
    "modern_stage1": (8, "h100", 0.92, 0.50),
    "modern_stage2": (8, "h100", 4.32, 3.65),
}


def test_every_recipe_is_here():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_value_says_where_it_is_from(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+:", line) and STAGES[name] != "lora":
            assert "#" in line or lines[number - 1].startswith("#"), f"{name}: {line}"
    text = "\n".join(lines)
    assert "2309.04669" in text or "see stage1.yaml" in text or "ours" in text


@pytest.mark.parametrize("stage", DEFAULTS)
def test_a_plan_without_a_recipe_is_that_of_the_recipe(stage):
    recipe = read_recipe(FOLDER / f"{stage}.yaml")
    assert {name: recipe[name] for name in DEFAULTS[stage]} == DEFAULTS[stage]
    choices = CHOICES.get(stage, {})
    assert {name: recipe[name] for name in choices} == choices


def test_a_plan_without_a_recipe_has_the_same_numbers() -> None:
    recipe = read_recipe(FOLDER / "lora.yaml")
    plans = [plan_training("lora", 100_000, recipe=given) for given in (None, recipe)]
    assert plans[0].num_parameters == plans[1].num_parameters and plans[0].memory == plans[1].memory


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts_at_full_size_without_weights_and_fits(monkeypatch, name):
    monkeypatch.chdir(EXAMPLES.parent)  # where unet_config is
    num_gpus, gpu, total, learned = PLANS[name]
    sizes = MODERN if name.startswith("modern") else {}
    num_samples = 100_000 if STAGES[name] == "lora" else None
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    plan = plan_training(STAGES[name], num_samples, recipe=recipe, num_gpus=num_gpus, gpu=gpu, **sizes)
    assert [count / 1e9 for count in plan.num_parameters] == pytest.approx([total, learned], rel=0.02)
    assert plan.fits and not [line for line in plan.warnings if "not fit" in line], plan.memory
    assert plan.memory["gradients"] > 0 and plan.memory["optimizer"] > 0 and plan.hours > 0
    if name in ("stage1", "stage2"):
        assert plan.batch_size == 2048


def small(tmp_path, name) -> dict[str, object]:
    """What of a recipe has to change for a model of 1/50 of the width, and a machine without GPU."""
    common = {
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 100,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    scenes = {"dataset": "scenes", "num_scenes": 16}
    if STAGES[name] == "stage1":
        vision = save_dual(tmp_path / "vision", "siglip") if name.startswith("modern") else CHECKPOINT
        sizes = {"codebook_size": 24, "codebook_dim": 6, "num_layers": 1, "kmeans_tokens_per_code": 1}
        # A share of 4 steps, not of 50,000.
        phases = {"bypass_merger_steps": 1, "selector_steps": 1, "quantize_after_steps": 2, "on_failure": "ignore"}
        return common | scenes | sizes | phases | {"vision_model": vision}
    if STAGES[name] == "stage2":
        scenes["mixture"] = "scenes scenes"
    if STAGES[name] == "stage2" and name.startswith("modern"):
        folder = tmp_path / "start"
        text = save_text(tmp_path / "text", "smollm3")
        start_from_parts(folder, text, save_dual(tmp_path / "vision", "siglip"))
        return common | scenes | {"model": folder, "max_length": 64}
    if STAGES[name] != "stage3":
        return common | scenes | {"model": CHECKPOINT, "max_length": 128}
    parts = {
        "token_decoder": build_token_decoder(cross_attention_dims=[9]),
        "vae": build_vae(),
        "visual_tokenizer": build_visual_tokenizer(),
    }
    share_codes(parts["token_decoder"], parts["visual_tokenizer"])
    for part, network in parts.items():
        network.save_pretrained(tmp_path / part)
    save_image_size(tmp_path / "visual_tokenizer")
    (tmp_path / "unet.json").write_text(json.dumps(unet_config()))
    paths = {part: tmp_path / part for part in parts} | {"unet_config": tmp_path / "unet.json"}
    return common | scenes | paths | {"height": 16, "width": 16, "num_validation_images": 0, "original_sizes": False}


def start_from_parts(folder, text, vision) -> None:
    """A LaVIT of parts, as README.md makes one."""
    from lavit_hf import ImageTextProcessor

    codes = {"codebook_size": 24, "codebook_dim": 6, "merger_num_layers": 1}
    model = LavitForConditionalGeneration.from_vision_text_pretrained(vision, text, **codes)
    with torch.no_grad():  # keeps some patches, as a trained one does
        for branch in (model.visual_tokenizer.discrete, model.visual_tokenizer.continuous):
            branch.selector.out_proj_3.bias[0] += 0.1
    model.save_pretrained(folder)
    ImageTextProcessor.from_vision_text_pretrained(vision, text, config=model).save_pretrained(folder)


def save_image_size(folder: Path) -> None:
    from lavit_hf import LavitImageProcessorPil

    LavitImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "qlora"])  # needs bitsandbytes
def test_it_runs_at_a_small_size(monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = importlib.import_module(SCRIPTS[name]).main
    options = [part for key, value in small(tmp_path, name).items() for part in (f"--{key}", *str(value).split())]
    trainer = main(["--config", str(FOLDER / f"{name}.yaml"), *options])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(torch.isfinite(torch.tensor(losses)))
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert trainer.args.learning_rate == recipe["learning_rate"], "what was not overridden is of the recipe"
    if STAGES[name] != "lora":
        assert trainer.train_dataset.shuffle_buffer == recipe["shuffle_buffer"], "data are streamed"
        assert trainer.state.log_history[0]["bad_samples"] == 0
    if STAGES[name] == "stage1":
        assert trainer.model.phase == "quantized"
        LavitVisualTokenizer.from_pretrained(tmp_path / "out" / "visual_tokenizer")


def test_qlora_quantizes_the_language_model_alone(monkeypatch, tmp_path):
    """What bitsandbytes is asked for; a run of it needs that package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    script = importlib.import_module("finetune_lora")
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    asked = {}

    def load(path, **options):
        asked.update(options, path=path)
        raise InterruptedError

    monkeypatch.setattr(LavitForConditionalGeneration, "from_pretrained", load)
    options = [part for key, value in small(tmp_path, "qlora").items() for part in (f"--{key}", str(value))]
    with pytest.raises(InterruptedError):
        script.main(["--config", str(FOLDER / "qlora.yaml"), *options])
    quantization = asked["quantization_config"]
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = {name for name in linears if should_convert_module(name, quantization.llm_int8_skip_modules)}
    assert quantized == {name for name in linears if name.startswith("model.language_model.")} and len(quantized) == 14
