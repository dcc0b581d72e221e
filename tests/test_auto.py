"""Auto classes on a converted directory, and saving everything once more."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

import lavit_hf


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoConfig, lavit_hf.LavitConfig),
        (AutoModel, lavit_hf.LavitModel),
        (AutoModelForImageTextToText, lavit_hf.LavitForConditionalGeneration),
        (AutoModelForMultimodalLM, lavit_hf.LavitForConditionalGeneration),
        (AutoProcessor, lavit_hf.ImageTextProcessor),
        (AutoTokenizer, lavit_hf.LavitTokenizer),
    ],
)
def test_auto_classes_find_the_classes(checkpoint: Path, auto, expected):
    assert type(auto.from_pretrained(checkpoint)) is expected


def test_auto_image_processor_finds_a_backend(checkpoint: Path):
    found = AutoImageProcessor.from_pretrained(checkpoint)
    assert isinstance(found, (lavit_hf.LavitImageProcessor, lavit_hf.LavitImageProcessorPil))


@pytest.mark.parametrize("subfolder", ["token_decoder", "lowres/token_decoder"])
def test_auto_model_finds_the_token_decoders(checkpoint: Path, subfolder):
    assert type(AutoModel.from_pretrained(checkpoint, subfolder=subfolder)) is lavit_hf.LavitTokenDecoder


def test_loading_leaves_nothing_over(checkpoint: Path):
    _, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_saving_and_loading_everything_is_lossless(checkpoint: Path, tmp_path: Path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint, visual_tokenizer=model.visual_tokenizer)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder, visual_tokenizer=model.visual_tokenizer)
    first, second = tmp_path / "first", tmp_path / "second"
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])
    original = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for (name, one), (_, other) in zip(original.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (first / name).read_text() == (checkpoint / name).read_text(), name


@pytest.mark.parametrize("with_diffusers", [True, False])
def test_star_import_has_the_pipelines(with_diffusers):
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *args: None if {not with_diffusers} and name == 'diffusers' "
        "else find(name, *args)\n"
        "import lavit_hf\n"
        "assert 'diffusers' not in sys.modules\n"
        "from lavit_hf import *\n"
        f"assert ('LavitTextToImagePipeline' in globals()) == {with_diffusers} and LavitConfig\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
