"""Everything that is wrong with a download is named, a line each, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.original_variants import (
    ENCODER,
    LANGUAGE_MODEL,
    STAGE1,
    STAGE2,
    copy_original,
    edit,
    shard_language_model,
    to_safetensors,
)
from lavit_hf.conversion import ConversionError, convert, verify

pytest.importorskip("diffusers")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
HIGHRES_UNET = "highres_pixel_decoding/unet/diffusion_pytorch_model.bin"


@pytest.fixture
def original(original_dir: Path, tmp_path: Path) -> Path:
    return copy_original(original_dir, tmp_path / "original")


@pytest.fixture
def converted(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "converted"))


def problems(root: Path) -> list[str]:
    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in root.parent.rglob("*")}

    before = files()
    found = verify(root, progress=False)
    assert files() == before, "something was written"
    assert not any("\n" in problem for problem in found)
    return found


def only(root: Path, *parts: str) -> None:
    """There is one problem, which names all of these."""
    (found,) = problems(root)
    assert all(part in found for part in parts), found


def damage(path: Path, tensor: torch.Tensor) -> None:
    """Flips the bits of the last bytes of a tensor where the file holds it."""
    content = bytearray(path.read_bytes())
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    at = content.index(raw) + len(raw) - 1
    content[at] ^= 1
    path.write_bytes(content)


def test_nothing_is_wrong_with_whole_ones(original, checkpoint):
    """Other numbers of heads than the published need no option here."""
    assert problems(original) == []
    assert problems(checkpoint) == []


def test_shards_and_safetensors(original):
    shard_language_model(original)
    to_safetensors(original / STAGE1)
    assert problems(original) == []
    (original / "language_model/pytorch_model-00002-of-00003.bin").unlink()
    only(original, "pytorch_model.bin.index.json", "pytorch_model-00002-of-00003.bin", "missing")


def test_all_that_a_broken_download_lacks_is_named_at_once(original):
    for name in (ENCODER, "language_model/tokenizer.model"):
        (original / name).unlink()
    for name in (STAGE2, HIGHRES_UNET):
        path = original / name
        path.write_bytes(path.read_bytes()[:-1000])
    tensor = torch.load(original / STAGE1, weights_only=True)["causal_encoder.blocks.0.mlp.fc1.weight"]
    damage(original / STAGE1, tensor)
    found = problems(original)
    assert len(found) == 5
    for name, reason in {
        "eva_vitg_psz14": "is missing",
        "tokenizer.model": "is missing",
        "visual_weight.bin": "is corrupt or truncated",
        HIGHRES_UNET: "is corrupt or truncated",
        "tokenizer_encoder.bin": "the checksum of",
    }.items():
        assert [reason in problem for problem in found if name in problem] == [True], found


def test_misnamed_misshapen_and_missing_tensors(original):
    def change(tensors):
        tensors["model.layers.1.odd.weight"] = tensors.pop(Q_PROJ)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    edit(original / LANGUAGE_MODEL, change)
    edit(original / HIGHRES_UNET, lambda tensors: tensors.pop("conv_in.bias"))
    found = problems(original)
    assert len(found) == 4
    for parts in (
        ("language_model/model: missing", Q_PROJ),
        ("language_model/model: unexpected", "model.layers.1.odd.weight"),
        ("language_model/model: model.norm.weight has shape",),
        ("highres_pixel_decoding/unet: missing conv_in.bias",),
    ):
        assert sum(all(part in problem for part in parts) for problem in found) == 1, found


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pixel_decoder_without_weights(original, part):
    """Regression: the largest file of a download was missing, and it was called complete."""
    weights = next((original / "highres_pixel_decoding" / part).glob("diffusion_pytorch_model.*"))
    weights.rename(weights.with_name(f"diffusion_pytorch_model.fp16{weights.suffix}"))
    only(original, f"highres_pixel_decoding/{part} has no weights")
    with pytest.raises(ConversionError, match=f"highres_pixel_decoding/{part} has no weights"):
        convert(original, original.parent / "converted", heads="vision=4,merger=4,decoder=4", progress=False)
    assert not (original.parent / "converted").exists()


@pytest.mark.parametrize(
    "name", ["pixel_decoding/scheduler", "pixel_decoding/unet", "visual_tokenizer/tokenizer_decoder.bin"]
)
def test_a_pixel_decoder_in_part(original, name):
    path = original / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    only(original, f"{name.removesuffix('.bin')}", "is missing")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers(original, dtype):
    edit(original / LANGUAGE_MODEL, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    only(original, f"language_model/model: {Q_PROJ} has the dtype {str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none(original, value, dtype):
    def change(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        tensors[Q_PROJ][-1, -1] = value

    edit(original / LANGUAGE_MODEL, change)
    only(original, "pytorch_model.bin", f"{Q_PROJ} holds NaN or infinity")


def test_a_text_tokenizer_of_another_model(original):
    (original / "language_model/tokenizer.model").write_bytes(b"no model")
    only(original, "tokenizer.model is not a sentencepiece model")


def test_pickles_that_could_run_code_are_refused(original, tmp_path):
    torch.save({"x": Path("x")}, original / STAGE2)
    only(original, "visual_weight.bin", "can run code")


def test_tensors_of_a_converted_checkpoint(converted):
    path = converted / "model.safetensors"
    tensors = load_file(path)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    tensors["odd"] = tensors.pop(name)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    unet = converted / "lowres/unet/diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(unet).items() if n != "conv_in.bias"}, unet)
    decoder = converted / "token_decoder/model.safetensors"
    tensors = load_file(decoder)
    del tensors["proj_in.weight"]
    save_file(tensors, decoder, metadata={"format": "pt"})
    found = problems(converted)
    assert [problem.replace(f"{converted}", "DIR").split(" [")[0] for problem in found] == [
        f"DIR: missing {name}",
        "DIR: unexpected odd",
        "DIR: lm_head.weight has shape",
        "DIR/token_decoder: missing proj_in.weight",
        "lowres/unet: missing conv_in.bias",
    ]


def test_files_of_a_converted_checkpoint(converted):
    (converted / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes()[:-1])
    vae = converted / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(vae)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    save_file(tensors, vae)
    (converted / "tokenizer.json").unlink()
    found = problems(converted)
    assert len(found) == 3
    for parts in (
        ("/model.safetensors", "corrupt or truncated"),
        ("vae", "decoder.conv_in.bias holds NaN"),
        ("tokenizer.json",),
    ):
        assert sum(all(part in problem for part in parts) for problem in found) == 1, found


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "llama"}), "[]"])
def test_a_configuration_of_something_else(converted, content):
    (converted / "config.json").write_text(content)
    assert problems(converted)


def test_adapters_are_called_so(tmp_path):
    """Regression: parts of the original layout were missing, said a line each."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConversionError, match="holds adapters of LoRA.* verify their base, or what lavit merge"):
        verify(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="is not a directory"):
        verify(tmp_path / "file")
