"""Checkpoints where the package is not installed, and where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lavit_hf
from lavit_hf import composition
from lavit_hf.remote_code.checkpoint import code_files, save_remote_code
from remote_code.standalone import compute

STANDALONE = Path(__file__).parent / "standalone.py"
PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"
AUTO_CLASSES = {
    "AutoConfig": lavit_hf.LavitConfig,
    "AutoModel": lavit_hf.LavitModel,
    "AutoModelForImageTextToText": lavit_hf.LavitForConditionalGeneration,
    "AutoModelForMultimodalLM": lavit_hf.LavitForConditionalGeneration,
    "AutoImageProcessor": lavit_hf.LavitImageProcessorPil,
    "AutoTokenizer": lavit_hf.LavitTokenizer,
    "AutoProcessor": lavit_hf.ImageTextProcessor,
}


def test_outputs_without_the_package_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    command = [sys.executable, STANDALONE, checkpoint, PICTURE, tmp_path]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pixel_decoder = lavit_hf.LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    own_tokens = []
    for name, source in (("first", checkpoint), ("again", checkpoint), ("own-tokens", tmp_path / "own-tokens")):
        model = lavit_hf.LavitForConditionalGeneration.from_pretrained(source)
        processor = lavit_hf.ImageTextProcessor.from_pretrained(source)
        expected = compute(model, processor, pixel_decoder, str(PICTURE))
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        own_tokens.append(int((found["own tokens"] > processor.tokenizer.eoi_token_id).sum()))
    assert own_tokens == [0, 0, 2]


@pytest.mark.parametrize("trust", [None, True, False])
@pytest.mark.parametrize("name", [name for name in AUTO_CLASSES if name != "AutoTokenizer"])
def test_the_package_comes_first(checkpoint: Path, name: str, trust: bool | None) -> None:
    found = getattr(transformers, name).from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(found) is AUTO_CLASSES[name]
    if name == "AutoProcessor":
        assert type(found.tokenizer) is lavit_hf.LavitTokenizer


@pytest.mark.parametrize("trust", [None, False])
def test_the_package_comes_first_for_tokenizers(checkpoint: Path, trust: bool | None) -> None:
    # With `True`, transformers prefers remote tokenizers even to registered ones; a processor takes either.
    found = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(found) is lavit_hf.LavitTokenizer


def test_parts_are_saved_with_their_code(checkpoint: Path, tmp_path: Path) -> None:
    processor = lavit_hf.ImageTextProcessor.from_pretrained(checkpoint)
    parts = {
        "visual_tokenizer": lavit_hf.LavitVisualTokenizer.from_pretrained(checkpoint),
        "tokenizer": processor.tokenizer,
        "image_processor": processor.image_processor,
    }
    expected = {
        "visual_tokenizer": ["AutoConfig", "AutoModel"],
        "tokenizer": ["AutoTokenizer"],
        "image_processor": ["AutoImageProcessor"],
    }
    files = {"visual_tokenizer": "config", "tokenizer": "tokenizer_config", "image_processor": "preprocessor_config"}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
        assert set(code_files()) <= {path.name for path in (tmp_path / name).iterdir()}
        config = transformers.PreTrainedConfig.get_config_dict(
            tmp_path / name, _configuration_file=f"{files[name]}.json"
        )
        assert sorted(config[0]["auto_map"]) == expected[name]
    found = transformers.AutoModel.from_pretrained(tmp_path / "visual_tokenizer")
    assert type(found) is lavit_hf.LavitVisualTokenizer


def test_what_is_loaded_equals_what_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    """transformers' own tests compare the dictionaries of both."""
    processor = lavit_hf.ImageTextProcessor.from_pretrained(checkpoint)
    config = lavit_hf.LavitConfig.from_pretrained(checkpoint)
    new = lavit_hf.LavitImageProcessorPil(size={"height": 56, "width": 56})
    assert processor.image_processor.to_dict() == new.to_dict()
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in config.to_dict() and "auto_map" not in processor.tokenizer.init_kwargs
    assert lavit_hf.LavitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert lavit_hf.ImageTextProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    save_remote_code(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_code_does_not_compose_new_models() -> None:
    code = "".join(code_files().values())
    functions = [
        name for name, value in vars(composition).items() if getattr(value, "__module__", "") == composition.__name__
    ]
    assert "compose_model" in functions
    assert [name for name in functions if f"def {name}(" in code] == []


def test_code_has_no_undefined_names(tmp_path: Path) -> None:
    for name, code in code_files().items():
        (tmp_path / name).write_text(code)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path)]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_code_needs_nothing_but_dependencies_of_transformers_and_diffusers(tmp_path: Path) -> None:
    wanted = {"PIL", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
    for name, code in code_files().items():
        (tmp_path / name).write_text(code)
        found = set(transformers.dynamic_module_utils.get_imports(tmp_path / name)) - sys.stdlib_module_names
        assert found <= wanted
