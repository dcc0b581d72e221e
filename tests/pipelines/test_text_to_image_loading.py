"""`DiffusionPipeline` draws prompts: with the package and without, from one file of code beside the weights."""

import json
import shutil
import subprocess

import pytest
import torch
from diffusers import DiffusionPipeline

from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from lavit_hf.remote_code import PIPELINE_CLASS, PIPELINE_MODULE, TEXT_TO_IMAGE_CLASS, TEXT_TO_IMAGE_MODULE

_REMOTE = """
import sys
package, source, target, result = sys.argv[1:]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lavit_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")

if package == "without":
    sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images

pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
images = draw(pipeline)
pipeline.save_pretrained(target)
again = DiffusionPipeline.from_pretrained(target, trust_remote_code=True)
assert torch.equal(draw(again), images)
assert torch.equal(draw(type(pipeline).from_pretrained(source, trust_remote_code=True)), images)
half = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, dtype=torch.bfloat16).to("cpu")
assert {part.dtype for part in (half.model, half.unet, half.vae, half.token_decoder)} == {torch.bfloat16}
half.set_progress_bar_config(disable=True)
assert len(half(["a cat", "a dog"], num_inference_steps=1).images) == 2
placed = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, device_map="cpu")
assert placed.hf_device_map == "cpu" and torch.equal(draw(placed), images)
assert (package == "with") == ("lavit_hf" in sys.modules)
assert type(pipeline.model).__module__.startswith("lavit_hf.") == (package == "with")
torch.save(images, result)
"""


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images


def index_of(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("package", ["with", "without"])
def test_prompts_are_drawn_with_and_without_the_package(python, checkpoint, tmp_path, package) -> None:
    command = [python, "-c", _REMOTE, package, str(checkpoint), str(tmp_path / "saved"), str(tmp_path / "images.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    images = torch.load(tmp_path / "images.pt")
    assert torch.equal(draw(LavitTextToImagePipeline.from_pretrained(checkpoint)), images)
    assert torch.equal(draw(LavitTextToImagePipeline.from_pretrained(tmp_path / "saved")), images)


def test_the_index_names_what_draws_prompts_where_there_is_a_language_model(checkpoint, tmp_path) -> None:
    pipeline = LavitTextToImagePipeline.from_pretrained(checkpoint)
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.pixel_decoder.save_pretrained(tmp_path / "pixels")
    whole, pixels = [TEXT_TO_IMAGE_MODULE, TEXT_TO_IMAGE_CLASS], [PIPELINE_MODULE, PIPELINE_CLASS]
    for folder, expected in (
        (checkpoint, whole),
        (checkpoint / "lowres", pixels),
        (tmp_path / "whole", whole),
        (tmp_path / "pixels", pixels),
    ):
        assert index_of(folder)["_class_name"] == expected
        assert (folder / f"{expected[0]}.py").is_file()


def test_directories_of_earlier_versions_load_as_before(checkpoint, tmp_path) -> None:
    """There the index names the pixel decoder."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint, folder)
    (folder / f"{TEXT_TO_IMAGE_MODULE}.py").unlink()
    index = {**index_of(folder), "_class_name": [PIPELINE_MODULE, PIPELINE_CLASS]}
    (folder / "model_index.json").write_text(json.dumps(index))
    remote = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(remote).__name__ == PIPELINE_CLASS and not hasattr(remote, "model")
    assert type(LavitPixelDecoderPipeline.from_pretrained(folder)) is LavitPixelDecoderPipeline
    assert LavitTextToImagePipeline.from_pretrained(folder).model is not None


def test_remote_code_is_not_run_unasked(checkpoint) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(checkpoint)


def test_a_language_model_that_is_not_there(checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint / "lowres", tmp_path / "pixels")
    pixels = LavitPixelDecoderPipeline.from_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"no LaVIT beside the pixel decoder, in .*/pixels: give `model`"):
        LavitTextToImagePipeline(None, None, **pixels.components)
    pixels.token_decoder.config._name_or_path = pixels.token_decoder.name_or_path = ""
    with pytest.raises(ValueError, match="in any directory"):
        LavitTextToImagePipeline(None, None, **pixels.components)


def test_one_that_writes_other_codes(checkpoint) -> None:
    pixels = LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    pixels.token_decoder.codebook.weight.data += 1
    with pytest.raises(ValueError, match="cannot draw: its pixel decoder was trained with the codes of another"):
        LavitTextToImagePipeline(None, None, **pixels.components)


def test_what_is_given_is_taken(checkpoint) -> None:
    whole = LavitTextToImagePipeline.from_pretrained(checkpoint)
    pixels = whole.pixel_decoder.components
    again = LavitTextToImagePipeline(whole.model, None, **pixels)
    assert again.model is whole.model and type(again.processor) is type(whole.processor)
