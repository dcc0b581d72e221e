"""Saving and loading: from LavitPixelDecoderPipeline and DiffusionPipeline, with and without this package."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from lavit_hf import LavitTokenDecoder
from lavit_hf.pipelines import LavitPixelDecoderPipeline
from pipelines.conftest import quiet

SHA = "0123456789abcdef0123456789abcdef01234567"


def draw(pipeline, codes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return quiet(pipeline)(codes, generator=generator, output_type="pt", num_inference_steps=2).images


def assert_same_weights(one, other) -> None:
    for name in ("token_decoder", "unet", "vae"):
        first, second = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_root_is_the_high_resolution_decoder(checkpoint):
    default = LavitPixelDecoderPipeline.from_pretrained(checkpoint)
    assert type(default) is LavitPixelDecoderPipeline and type(default.token_decoder) is LavitTokenDecoder
    assert default.is_highres and default.safety_checker is None
    assert default.config.visual_token_offset == 302 and default.config.eoi_token_id == 301
    assert LavitPixelDecoderPipeline.from_pretrained(str(checkpoint), decoder="highres").is_highres
    assert not LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder="lowres").is_highres
    assert not LavitPixelDecoderPipeline.from_pretrained(checkpoint / "lowres").is_highres


def test_save_and_load_is_lossless(pipeline, codes, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = LavitPixelDecoderPipeline.from_pretrained(tmp_path)
    assert_same_weights(loaded, pipeline)
    assert loaded.scheduler.config == pipeline.scheduler.config
    assert loaded.config.visual_token_offset == 302 and loaded.config.eoi_token_id == 301
    assert torch.equal(draw(loaded, codes), draw(pipeline, codes))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model_index.json", "token_decoder/config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


def test_negative_condition_is_stored_once(lowres, tmp_path, golden):
    lowres.save_pretrained(tmp_path)
    names = [name for path in tmp_path.rglob("*.safetensors") for name in load_file(path)]
    assert names.count("negative_condition") == 1
    loaded = LavitPixelDecoderPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.token_decoder.negative_condition, golden["uncond_embeddings"][0])


def test_saved_directory_has_one_decoder(lowres, highres, tmp_path):
    lowres.save_pretrained(tmp_path / "lowres_only")
    assert not LavitPixelDecoderPipeline.from_pretrained(tmp_path / "lowres_only", decoder="lowres").is_highres
    with pytest.raises(OSError, match="no highres pixel decoder, only a lowres one"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "lowres_only", decoder="highres")
    highres.save_pretrained(tmp_path / "highres_only")
    with pytest.raises(OSError, match="no lowres pixel decoder, only a highres one"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "highres_only", decoder="lowres")


def test_directories_without_a_decoder(checkpoint, tmp_path):
    with pytest.raises(OSError, match="no pixel decoder"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path)
    (tmp_path / "lowres").mkdir()
    with pytest.raises(OSError, match="no lowres pixel decoder"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path, decoder="lowres")
    with pytest.raises(ValueError, match="'highres' or 'lowres'; got 'medium'"):
        LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder="medium")
    for name in (tmp_path / "nowhere", "no/such/directory", "nobody/nothing"):
        with pytest.raises(OSError, match="neither a directory nor"):
            LavitPixelDecoderPipeline.from_pretrained(name)


def test_components_may_be_given(checkpoint, highres, codes):
    loaded = LavitPixelDecoderPipeline.from_pretrained(
        checkpoint, token_decoder=highres.token_decoder, unet=highres.unet, visual_token_offset=7
    )
    assert loaded.unet is highres.unet and loaded.token_decoder is highres.token_decoder
    assert loaded.config.visual_token_offset == 7


def test_dtype(checkpoint):
    loaded = LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder="lowres", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.token_decoder.parameters()} == {torch.bfloat16}
    assert loaded.token_decoder.negative_condition.dtype == torch.bfloat16
    assert loaded.unet.dtype == loaded.vae.dtype == torch.bfloat16


@pytest.fixture
def hub_cache(checkpoint, tmp_path) -> Path:
    """A cache of the Hub into which the repository somebody/lavit was downloaded."""
    repository = tmp_path / "cache" / "models--somebody--lavit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    shutil.copytree(checkpoint, repository / "snapshots" / SHA)
    return tmp_path / "cache"


@pytest.mark.parametrize("decoder", ["highres", "lowres"])
def test_repositories_of_the_hub(hub_cache, checkpoint, decoder):
    loaded = LavitPixelDecoderPipeline.from_pretrained("somebody/lavit", decoder=decoder, cache_dir=hub_cache)
    assert loaded.is_highres == (decoder == "highres") and loaded.name_or_path == "somebody/lavit"
    assert_same_weights(loaded, LavitPixelDecoderPipeline.from_pretrained(checkpoint, decoder=decoder))


@pytest.mark.parametrize("decoder", ["highres", "lowres"])
def test_only_one_decoder_is_downloaded(checkpoint, tmp_path, monkeypatch, decoder):
    from huggingface_hub.utils import filter_repo_objects

    from lavit_hf.pipelines import pixel_decoder_loading

    def download(repository, allow_patterns, ignore_patterns, **options):
        assert repository == "somebody/lavit" and options == {"revision": "v1"}
        files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(pixel_decoder_loading, "snapshot_download", download)
    loaded = LavitPixelDecoderPipeline.from_pretrained("somebody/lavit", decoder=decoder, revision="v1")
    assert loaded.is_highres == (decoder == "highres")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files.remove("config.json")  # says which ids the codes have
    assert all(file.startswith("lowres/") == (decoder == "lowres") for file in files)
    assert not any(file.endswith(".py") for file in files) and "model.safetensors" not in files


def test_files_that_diffusers_shall_not_download(checkpoint):
    ignored = json.loads((checkpoint / "model_index.json").read_text())["_ignore_files"]
    weights = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.safetensors")}
    own = {name for name in weights if name.split("/")[0] in ("token_decoder", "unet", "vae")}
    assert len(own) == 3 and set(ignored) == weights - own


def test_conversion_knows_the_safety_checker(original_dir, tmp_path):
    from conversion.original_variants import HEADS, copy_original
    from lavit_hf.conversion import convert

    original = copy_original(original_dir, tmp_path / "original")
    (original / "pixel_decoding/safety_checker").mkdir()
    (original / "pixel_decoding/safety_checker/config.json").write_text("{}")
    torch.save({"concept_embeds": torch.randn(3, 4)}, original / "pixel_decoding/safety_checker/pytorch_model.bin")
    (original / "pixel_decoding/feature_extractor").mkdir()
    (original / "pixel_decoding/feature_extractor/preprocessor_config.json").write_text("{}")
    shutil.rmtree(original / "highres_pixel_decoding/vae")
    converted = convert(original, tmp_path / "converted", heads=HEADS, progress=False)
    index = json.loads((converted / "lowres/model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert not (converted / "model_index.json").exists()
    with pytest.raises(OSError, match="no highres pixel decoder.*decoder='lowres'"):
        LavitPixelDecoderPipeline.from_pretrained(converted)
    LavitPixelDecoderPipeline.from_pretrained(converted, decoder="lowres", safety_checker=None)


def test_remote_code_is_not_run_unasked(checkpoint):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(checkpoint)


_REMOTE = """
import sys
package, source, decoder, target, noise = sys.argv[1:]

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
    codes = [[3, 14, 15], [9]]
    return pipeline(codes, latents=torch.load(noise), output_type="pt", num_inference_steps=2).images

pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
images = draw(pipeline)
pipeline.save_pretrained(target)
again = DiffusionPipeline.from_pretrained(target, trust_remote_code=True)
assert torch.equal(draw(again), images)
assert pipeline.is_highres == (decoder == "highres")
own = type(pipeline).from_pretrained(source, trust_remote_code=True)
assert torch.equal(draw(own), images)
assert (package == "with") == ("lavit_hf" in sys.modules)
torch.save(images, noise)
"""


@pytest.mark.parametrize("decoder", ["highres", "lowres"])
@pytest.mark.parametrize("package", ["with", "without"])
def test_diffusion_pipeline_with_and_without_the_package(python, checkpoint, tmp_path, package, decoder):
    source = checkpoint / "lowres" if decoder == "lowres" else checkpoint
    noise, target = tmp_path / "tensor.pt", tmp_path / "saved"
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(latents, noise)
    command = [python, "-c", _REMOTE, package, str(source), decoder, str(target), str(noise)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pipeline = quiet(LavitPixelDecoderPipeline.from_pretrained(source))
    codes = [[3, 14, 15], [9]]
    expected = pipeline(codes, latents=latents, output_type="pt", num_inference_steps=2).images
    torch.testing.assert_close(torch.load(noise), expected, atol=1e-5, rtol=0)
    assert (target / "model_index.json").is_file() and list(target.glob("*.py"))
    assert_same_weights(LavitPixelDecoderPipeline.from_pretrained(target), pipeline)
