"""Saving and loading, with and without this package; files that do not fit together are named."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lavit_hf import LavitTokenDecoder
from lavit_hf.pipelines import LavitPixelDecoderPipeline, LavitTextToImagePipeline
from lavit_hf.pipelines.pixel_decoder_storage import keep_config
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

    from lavit_hf.pipelines import pixel_decoder_storage

    def download(repository, allow_patterns, ignore_patterns, **options):
        assert repository == "somebody/lavit" and options == {"revision": "v1"}
        files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(pixel_decoder_storage, "snapshot_download", download)
    loaded = LavitPixelDecoderPipeline.from_pretrained("somebody/lavit", decoder=decoder, revision="v1")
    assert loaded.is_highres == (decoder == "highres")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files.remove("config.json")  # says which ids the codes have
    assert all(file.startswith("lowres/") == (decoder == "lowres") for file in files)
    assert not any(file.endswith(".py") for file in files) and "model.safetensors" not in files


def test_files_that_diffusers_shall_not_download(checkpoint):
    ignored = json.loads((checkpoint / "model_index.json").read_text())["_ignore_files"]
    weights = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.safetensors")}
    own = {name for name in weights if name.split("/")[0] in ("token_decoder", "unet", "vae", "model.safetensors")}
    assert len(own) == 4 and set(ignored) == weights - own


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
    pipeline = getattr(pipeline, "pixel_decoder", pipeline)  # the second half of what draws prompts
    return pipeline(codes, latents=torch.load(noise), output_type="pt", num_inference_steps=2).images

pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
images = draw(pipeline)
pipeline.save_pretrained(target)
again = DiffusionPipeline.from_pretrained(target, trust_remote_code=True)
assert torch.equal(draw(again), images)
assert hasattr(pipeline, "model") == (decoder == "highres")  # whose directory has the language model, too
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


def change(checkpoint, folder, file, **values):
    shutil.copytree(checkpoint, folder)
    content = {**json.loads((folder / file).read_text()), **values}
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value != "nothing"}))
    return folder


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"visual_token_offset": 7}),
        ("model_index.json", {"visual_token_offset": 7, "eoi_token_id": 6}),  # differs from config.json
        ("model_index.json", {"visual_token_offset": "302"}),
        ("model_index.json", {"unet": 5}),
        ("model_index.json", {"unet": "nothing"}),
        ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}),
        ("model_index.json", {"unet": ["no_library", "UNet2DConditionModel"]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"block_out_channels": "x"}),
        ("vae/config.json", {"latent_channels": 8}),
        ("token_decoder/config.json", {"num_layers": 10**7}),
        ("token_decoder/config.json", {"codebook_size": 32}),
    ],
)
def test_values_that_do_not_fit(checkpoint, tmp_path, file, values):
    folder = change(checkpoint, tmp_path / "changed", file, **values)
    for pipeline in (LavitPixelDecoderPipeline, LavitTextToImagePipeline):
        with pytest.raises(ValueError, match=str(folder / file)):
            pipeline.from_pretrained(folder)


def test_low_resolution_is_compared_with_the_language_model_above_it(checkpoint, tmp_path):
    values = {"visual_token_offset": 7, "eoi_token_id": 6}
    folder = change(checkpoint, tmp_path / "changed", "lowres/model_index.json", **values)
    with pytest.raises(ValueError, match=r"7 in .*lowres/model_index\.json, but 302 in .*config\.json"):
        LavitPixelDecoderPipeline.from_pretrained(folder, decoder="lowres")
    assert LavitPixelDecoderPipeline.from_pretrained(folder).config.visual_token_offset == 302


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "token_decoder/config.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"_class_name": ', b"\xff\xfe"])
def test_files_that_are_no_json_objects(checkpoint, tmp_path, file, content):
    shutil.copytree(checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / file).write_bytes(content)
    with pytest.raises(OSError, match=str(tmp_path / "broken" / file)):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


def test_corrupt_weights(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=str(file)):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_lack_a_tensor(checkpoint, tmp_path, part):
    shutil.copytree(checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = max(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"{file} lacks 1 tensors, the first is {lost}"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path / "broken")


def test_ids_that_cannot_be(highres):
    with pytest.raises(ValueError, match="ids 300 to 363 .* image end cannot have the id 301"):
        LavitPixelDecoderPipeline(**{**highres.components, "visual_token_offset": 300})


def test_ids_come_along_with_components(highres, codes):
    ids = [code + 302 for code in codes]
    for other in (LavitPixelDecoderPipeline(**highres.components), LavitPixelDecoderPipeline.from_pipe(highres)):
        assert (other.config.visual_token_offset, other.config.eoi_token_id) == (302, 301)
        other.set_progress_bar_config(disable=True)
        other(input_ids=ids, num_inference_steps=1)
    assert highres.to("cpu").device.type == "cpu"  # diffusers finds modules among the components


def test_ids_come_from_the_language_model(checkpoint):
    whole = LavitTextToImagePipeline.from_pretrained(checkpoint)
    decoder = LavitPixelDecoderPipeline.from_pipe(whole)
    assert (decoder.config.visual_token_offset, decoder.config.eoi_token_id) == (302, 301)
    again = LavitTextToImagePipeline.from_pipe(decoder, model=whole.model, processor=whole.processor)
    assert again.model is whole.model and again.unet is whole.unet
    with pytest.raises(ValueError, match="id of code 0 is 302 in the model, 302 in the processor, 7 in the pixel"):
        LavitTextToImagePipeline(**{**whole.components, "visual_token_offset": 7})


def test_a_variant_that_cannot_be_saved_leaves_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("whole")

    def save() -> None:
        with keep_config(tmp_path, "fp16"):
            (tmp_path / "config.json").write_text("of the variant")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        save()
    assert (tmp_path / "config.json").read_text() == "whole"
