"""Pixel decoders follow a checkpoint that was fine-tuned."""

import json
import shutil
from pathlib import Path

import pytest

from lavit_hf import LavitPixelDecoderPipeline
from lavit_hf.pipelines import pixel_decoder_files
from lavit_hf.pipelines.pixel_decoder_files import copy_pixel_decoders

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "lavit-tiny-random"


def test_both_decoders_are_copied_and_nothing_else(tmp_path):
    names = copy_pixel_decoders(CHECKPOINT, tmp_path)
    assert sorted(names) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert {name.split("/")[0] for name in names} == {
        "lowres", "model_index.json", "pipeline_lavit_pixel_decoder.py", "scheduler", "token_decoder", "unet", "vae"
    }  # fmt: skip
    assert names[-1] == "lowres/model_index.json"
    for decoder in ("highres", "lowres"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path, decoder=decoder)


def test_beside_a_language_model_they_become_a_pipeline_of_prompts(tmp_path):
    """Whatever the source's index says, which earlier versions wrote otherwise."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(CHECKPOINT, source)
    index = json.loads((source / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline_lavit_pixel_decoder", "LavitPixelDecoderPipeline"]}
    index["_ignore_files"] = ["model.safetensors", "lowres/unet/diffusion_pytorch_model.safetensors"]
    (source / "model_index.json").write_text(json.dumps(index))
    target.mkdir()
    for name in ("config.json", "processor_config.json"):
        shutil.copy(CHECKPOINT / name, target)
    names = copy_pixel_decoders(source, target)
    written = json.loads((target / "model_index.json").read_text())
    assert written["_class_name"] == ["pipeline_lavit_text_to_image", "LavitTextToImagePipeline"]
    assert written["_ignore_files"] == ["lowres/unet/diffusion_pytorch_model.safetensors"]
    assert "pipeline_lavit_text_to_image.py" in names and (target / "pipeline_lavit_text_to_image.py").is_file()


def test_of_a_repository(tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(CHECKPOINT)

    monkeypatch.setattr(pixel_decoder_files, "snapshot_download", download)
    assert "unet/config.json" in copy_pixel_decoders("user/lavit", tmp_path)
    assert [repository for repository, _ in asked] == ["user/lavit"] * 2
    assert asked[0][1] == ["model_index.json", "lowres/model_index.json"] and "unet/*" in asked[1][1]


def test_checkpoints_without_one(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    assert copy_pixel_decoders(tmp_path / "source", tmp_path / "target") == []
    assert not (tmp_path / "target").exists()


def test_incomplete_ones_are_refused(tmp_path):
    source = tmp_path / "source"
    copy_pixel_decoders(CHECKPOINT, source)
    shutil.rmtree(source / "vae")
    with pytest.raises(OSError, match=r"has a pixel decoder \(model_index.json\), but no vae/\*"):
        copy_pixel_decoders(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_decoder_that_is_there_stays(tmp_path):
    copy_pixel_decoders(CHECKPOINT, tmp_path)
    (tmp_path / "unet" / "config.json").write_text("mine")
    (tmp_path / "lowres" / "model_index.json").unlink()
    assert {name.split("/")[0] for name in copy_pixel_decoders(CHECKPOINT, tmp_path)} == {"lowres"}
    assert (tmp_path / "unet" / "config.json").read_text() == "mine"


def test_a_directory_into_itself(tmp_path):
    copy_pixel_decoders(CHECKPOINT, tmp_path)
    before = json.loads((tmp_path / "model_index.json").read_text())
    assert copy_pixel_decoders(tmp_path, tmp_path) == []
    assert json.loads((tmp_path / "model_index.json").read_text()) == before


def test_without_any_decoder_the_error_names_none(tmp_path):
    with pytest.raises(OSError, match=r"holds no pixel decoder \(no model_index.json\)"):
        LavitPixelDecoderPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["../secret", "unet/../../secret", "/etc", "*"])
def test_parts_elsewhere_are_refused(tmp_path, part):
    source = tmp_path / "source" / "lavit"
    copy_pixel_decoders(CHECKPOINT, source)
    (tmp_path / "source" / "secret").mkdir()
    (tmp_path / "source" / "secret" / "key").write_text("secret")
    index = json.loads((source / "model_index.json").read_text())
    for change in ({part: ["diffusers", "UNet2DModel"]}, {"_class_name": [part, "Pipeline"]}):
        (source / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match="which cannot be a part of a pipeline"):
            copy_pixel_decoders(source, tmp_path / "to" / "target")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("value", [["diffusers"], ["diffusers", 3], []])
def test_parts_are_a_library_and_a_class(tmp_path, value):
    copy_pixel_decoders(CHECKPOINT, tmp_path / "source")
    path = tmp_path / "source" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unet": value}))
    with pytest.raises(ValueError, match="'unet' is not a library and a class, but "):
        copy_pixel_decoders(tmp_path / "source", tmp_path / "target")


def test_links_out_of_the_source_are_refused(tmp_path):
    source = tmp_path / "source"
    copy_pixel_decoders(CHECKPOINT, source)
    (source / "unet" / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="has unet/notes.txt, which links to /etc/passwd outside of it"):
        copy_pixel_decoders(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
