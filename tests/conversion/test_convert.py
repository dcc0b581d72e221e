"""What conversion writes is what `from_pretrained` reads."""

import errno
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.original_variants import (
    ENCODER,
    HEADS,
    HIGHRES_DECODER,
    LANGUAGE_MODEL,
    LOWRES_DECODER,
    STAGE1,
    STAGE2,
    copy_original,
    edit,
    load,
    shard_language_model,
    to_safetensors,
)
from lavit_hf import LavitForConditionalGeneration, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.conversion import ConversionError, convert, convert_to_original, parse_heads

diffusers = pytest.importorskip("diffusers")


def _assert_complete(report: dict) -> None:
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_model_loads_without_a_gap(checkpoint):
    model, report = LavitForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    _assert_complete(report)
    stored = load_file(checkpoint / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_visual_tokenizer_loads_from_shards_without_the_language_models(original_dir, checkpoint, tmp_path):
    converted = convert(original_dir, tmp_path / "converted", heads=HEADS, max_shard_size="300KB", progress=False)
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    visual = {shard for name, shard in index.items() if name.startswith("model.visual_tokenizer.")}
    others = set(index.values()) - visual
    for shard in others:
        (converted / shard).unlink()
    expected = load_file(checkpoint / "model.safetensors")
    loaded = LavitVisualTokenizer.from_pretrained(converted).state_dict()
    assert others and loaded
    assert all(torch.equal(value, expected[f"model.visual_tokenizer.{name}"]) for name, value in loaded.items())


@pytest.mark.parametrize("folder", ["token_decoder", "lowres/token_decoder"])
def test_token_decoders_load_and_carry_the_codebook(checkpoint, folder):
    decoder, report = LavitTokenDecoder.from_pretrained(checkpoint / folder, output_loading_info=True)
    _assert_complete(report)
    model = load_file(checkpoint / "model.safetensors")
    codebook = model["model.visual_tokenizer.discrete.quantizer.codebook.weight"]
    assert torch.equal(decoder.state_dict()["codebook.weight"], codebook)


def test_nothing_else_is_stored_twice(checkpoint):
    seen: dict[tuple, str] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if "unet" in path.parts or "vae" in path.parts:  # freshly initialized norms are all alike
            continue
        for name, tensor in load_file(path).items():
            if "codebook" in name or tensor.unique().numel() < 4:
                continue
            key = (tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
            assert key not in seen, (name, seen[key])
            seen[key] = name


@pytest.mark.parametrize("folder", ["", "lowres"])
def test_unet_and_vae_load(checkpoint, folder):
    for name, model_class in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        _, report = model_class.from_pretrained(checkpoint / folder / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    diffusers.DDIMScheduler.from_pretrained(checkpoint / folder / "scheduler")


def test_sharded_unet_loads(original_dir, checkpoint, tmp_path):
    converted = convert(original_dir, tmp_path / "converted", heads=HEADS, max_shard_size="200KB", progress=False)
    assert len(list((converted / "unet").glob("*-of-*.safetensors"))) > 1
    loaded = diffusers.UNet2DConditionModel.from_pretrained(converted / "unet").state_dict()
    expected = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_vae_of_an_old_diffusers_keeps_its_names_and_loads(original_dir, tmp_path, checkpoint):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [name for name in tensors if "attentions" in name]:
            new = name
            for current, old in old_names.items():
                new = new.replace(f".{current}.", f".{old}.")
            tensors[new] = tensors.pop(name)

    original = copy_original(original_dir, tmp_path / "original")
    edit(original / "pixel_decoding/vae/diffusion_pytorch_model.bin", rename)
    converted = convert(original, tmp_path / "converted", heads=HEADS, progress=False)
    assert any(".proj_attn." in n for n in load_file(converted / "lowres/vae/diffusion_pytorch_model.safetensors"))
    old = diffusers.AutoencoderKL.from_pretrained(converted / "lowres/vae").state_dict()
    new = diffusers.AutoencoderKL.from_pretrained(checkpoint / "lowres/vae").state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)


def test_inferred_configuration(checkpoint):
    config = LavitForConditionalGeneration.from_pretrained(checkpoint).config
    visual = config.visual_tokenizer_config
    assert (config.boi_token_id, config.eoi_token_id, config.visual_token_offset) == (300, 301, 302)
    assert (config.image_token_id, config.text_config.vocab_size) == (0, 366)
    assert (visual.vision_config.image_size, visual.vision_config.patch_size, visual.num_patches) == (56, 14, 16)
    assert (visual.vision_config.num_attention_heads, visual.merger_num_heads, visual.merger_num_layers) == (4, 4, 2)
    assert (visual.codebook_size, visual.codebook_dim, visual.attention_smoothing) == (64, 8, 1e-6)
    decoder = json.loads((checkpoint / "token_decoder/config.json").read_text())
    assert (decoder["cross_attention_dims"], decoder["pooled_size"], decoder["num_queries"]) == ([24, 40], 40, 16)
    lowres = json.loads((checkpoint / "lowres/token_decoder/config.json").read_text())
    assert (lowres["cross_attention_dims"], lowres["pooled_size"]) == ([24], None)


def test_special_ids_for_generation(checkpoint):
    ids = json.loads((checkpoint / "generation_config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)


def test_negative_condition_of_the_low_resolution_decoder(checkpoint, golden):
    decoder = LavitTokenDecoder.from_pretrained(checkpoint / "lowres/token_decoder")
    assert torch.equal(decoder.negative_condition, golden["uncond_embeddings"][0])
    assert LavitTokenDecoder.from_pretrained(checkpoint / "token_decoder").negative_condition is None


def test_code_of_the_model_card_runs(checkpoint, original_dir, capsys):
    card = (checkpoint / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/directory", str(checkpoint))
    exec(code.replace("picture.png", str(original_dir / "images/0.png")), {})
    assert capsys.readouterr().out.startswith("[")


def test_files_are_readable_by_others(checkpoint: Path):
    for path in [checkpoint, *checkpoint.rglob("*")]:
        assert path.stat().st_mode & 0o044 == 0o044


# Conversions that cannot succeed: the error names the reason, and nothing is left behind.


@pytest.fixture
def original(original_dir: Path, tmp_path: Path) -> Path:
    return copy_original(original_dir, tmp_path / "original")


def _error(original: Path, **options) -> str:
    destination = original.parent / "converted"
    before = sorted(original.parent.iterdir())
    with pytest.raises(ConversionError) as caught:
        convert(original, destination, **{"heads": HEADS, "progress": False, **options})
    assert sorted(original.parent.iterdir()) == before, "something was left behind"
    return str(caught.value)


def test_missing_files_are_all_named(original):
    for name in (ENCODER, STAGE2, LANGUAGE_MODEL, "language_model/tokenizer.model"):
        (original / name).unlink()
    message = _error(original)
    for name in ("eva_vitg_psz14", "visual_weight", "language_model/model", "tokenizer.model"):
        assert name in message


@pytest.mark.parametrize(
    ("file", "name"),
    [("language_model/config.json", "num_hidden_layers"), ("pixel_decoding/unet/config.json", "layers_per_block")],
)
def test_numbers_of_layers_that_nobody_could_build(original, file, name):
    path = original / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 10**7}))
    message = _error(original)
    assert file in message and f"{name} is 10000000" in message


@pytest.mark.parametrize("value", [[[]], "x", {"a": 1}, -1])
@pytest.mark.parametrize("name", ["down_block_types", "block_out_channels"])
def test_networks_of_a_pixel_decoder_that_nobody_could_build(original, name, value):
    path = original / "pixel_decoding/vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert "pixel_decoding/vae/config.json does not describe a network of the class AutoencoderKL" in _error(original)


def test_source_that_is_no_checkpoint(tmp_path, original, checkpoint):
    assert "does not exist" in _error(tmp_path / "nowhere")
    assert "is not a directory" in _error(original / "language_model/config.json")
    with pytest.raises(ConversionError, match="converted already"):
        convert(checkpoint, tmp_path / "converted", progress=False)


def test_every_bad_tensor_is_named(original):
    edit(original / ENCODER, lambda t: (t.pop("blocks.1.attn.v_bias"), t.update({"extra.weight": torch.zeros(2)})))
    edit(original / STAGE1, lambda t: t.pop("token_predictor.out_conv.4.bias"))
    edit(original / STAGE2, lambda t: t.update({"vit_proj.weight": torch.zeros(48, 63), "odd": torch.zeros(1)}))
    edit(original / LANGUAGE_MODEL, lambda t: t.pop("model.norm.weight"))
    edit(original / HIGHRES_DECODER, lambda t: t.update({"blocks.0.mlp.fc2.bias": torch.zeros(3)}))
    message = _error(original)
    for line in (
        "visual_tokenizer/eva_vitg_psz14: missing blocks.1.attn.v_bias [64]",
        "visual_tokenizer/eva_vitg_psz14: unexpected extra.weight [2]",
        "visual_tokenizer/tokenizer_encoder: missing token_predictor.out_conv.4.bias [2]",
        "language_model/visual_weight: vit_proj.weight has shape [48, 63], expected [48, 64]",
        "language_model/visual_weight: unexpected odd [1]",
        "language_model/model: missing model.norm.weight [48]",
        "visual_tokenizer/highres_tokenizer_decoder: blocks.0.mlp.fc2.bias has shape [3], expected [64]",
    ):
        assert line in message
    assert message.count("\n") == 7


@pytest.mark.parametrize(
    ("file", "name", "shape"),
    [
        (ENCODER, "cls_token", (1, 1, 63)),
        (ENCODER, "blocks.0.mlp.fc1.weight", (279, 60)),
        (ENCODER, "patch_embed.proj.weight", (64, 3, 14, 14, 1)),
        (STAGE1, "encode_task_layer.0.weight", (64, 65)),
        (STAGE2, "causal_encoder.blocks.1.token_causal_attn.qkv.weight", (191, 64)),
        (LANGUAGE_MODEL, "lm_head.weight", (365, 48)),
        (LOWRES_DECODER, "query_embed", (1, 15, 64)),
    ],
)
def test_misshapen_tensor_is_named(original, file, name, shape):
    edit(original / file, lambda t: t.update({name: torch.zeros(shape)}))
    assert name in _error(original)


def test_positions_of_no_square_image(original):
    edit(original / ENCODER, lambda t: t.update({"pos_embed": torch.zeros(1, 19, 64)}))
    assert "square" in _error(original)


def test_negative_condition_that_does_not_fit(original):
    path = original / "pixel_decoding/uncond_embeddings.bin"
    torch.save(torch.zeros(1, 17, 24), path)
    assert "17 rows, but the token decoder has only 16" in _error(original)
    torch.save(torch.zeros(1, 7, 23), path)
    assert "uncond_embeddings has shape [1, 7, 23], expected [1, 7, 24]" in _error(original)
    torch.save({"rows": torch.zeros(1, 7, 24)}, path)
    assert "no usable tensor uncond_embeddings" in _error(original)


def test_bad_tensors_of_the_pixel_decoders_are_named(original):
    pytest.importorskip("diffusers")
    unet = "highres_pixel_decoding/unet/diffusion_pytorch_model.bin"
    edit(original / unet, lambda t: (t.pop("conv_in.bias"), t.update({"extra": torch.zeros(1)})))
    edit(
        original / "pixel_decoding/vae/diffusion_pytorch_model.bin",
        lambda t: t.update({"quant_conv.bias": torch.zeros(3)}),
    )
    message = _error(original)
    assert "highres_pixel_decoding/unet: missing conv_in.bias [8]" in message
    assert "highres_pixel_decoding/unet: unexpected extra [1]" in message
    assert "pixel_decoding/vae: quant_conv.bias has shape [3], expected [8]" in message


def test_two_different_encoders(original):
    changed = {f"encoder.{name}": tensor + 1 for name, tensor in load(original / ENCODER).items() if "norm1" in name}
    edit(original / STAGE2, lambda t: t.update(changed))
    assert "encoder.blocks.0.norm1.weight differs" in _error(original)


@pytest.mark.parametrize("file", [ENCODER, LANGUAGE_MODEL, "pixel_decoding/uncond_embeddings.bin"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_pickle(original, file, damage):
    path = original / file
    content = {"truncated": path.read_bytes()[:-500], "garbage": os.urandom(1000), "empty": b""}[damage]
    path.write_bytes(content)
    message = _error(original)
    assert path.name in message and "corrupt or truncated" in message


def test_flipped_byte_in_a_pickle(original):
    path = original / LANGUAGE_MODEL
    content = bytearray(path.read_bytes())
    content[40_000] ^= 1  # inside the first tensor
    path.write_bytes(content)
    message = _error(original)
    assert path.name in message and "checksum" in message


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_safetensors_shard(original, damage):
    shard_language_model(original, "safetensors")
    path = sorted((original / "language_model").glob("*.safetensors"))[1]
    path.write_bytes({"truncated": path.read_bytes()[:-100], "garbage": os.urandom(1000), "empty": b""}[damage])
    assert path.name in _error(original)


def test_missing_shards(original):
    shard_language_model(original)
    (original / "language_model/pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin" in _error(original)
    (original / "language_model/pytorch_model.bin.index.json").unlink()
    assert "2 of 3 shards" in _error(original)


def test_same_tensor_in_two_shards(original):
    shard_language_model(original)
    for number in (1, 2):
        shard = original / f"language_model/pytorch_model-0000{number}-of-00003.bin"
        edit(shard, lambda t: t.update({"lm_head.weight": torch.ones(2)}))
    message = _error(original)
    assert "more than one shard" in message and "lm_head.weight" in message


class _Evil:
    def __reduce__(self):
        return os.system, ("echo unsafe",)


def test_pickles_that_run_code_are_refused(original, capfd):
    (original / STAGE1).write_bytes(pickle.dumps({"a": _Evil()}))
    _error(original)
    torch.save({"a": _Evil()}, original / STAGE1)
    assert "refused" in _error(original)
    assert "unsafe" not in capfd.readouterr().out


def test_pickle_with_other_contents(original):
    torch.save({"epoch": 3, "model": {}}, original / STAGE1)
    assert "no tensors: epoch, model" in _error(original)
    torch.save([1, 2], original / STAGE1)
    assert "list instead of named tensors" in _error(original)


def test_text_tokenizer_that_does_not_fit(original):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.zeros(370, 48)

    edit(original / LANGUAGE_MODEL, grow)
    config = original / "language_model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 370}))
    message = _error(original)
    assert "300 tokens" in message and "304" in message


def test_broken_text_tokenizer(original):
    (original / "language_model/tokenizer.model").write_bytes(b"no model")
    assert "tokenizer.model" in _error(original)


def test_broken_language_model_config(original):
    config = original / "language_model/config.json"
    config.write_text("{")
    assert "config.json" in _error(original)
    config.write_text('{"model_type": "unheard-of", "vocab_size": 366}')
    assert "known model" in _error(original)
    config.write_text('{"model_type": "llama", "vocab_size": 50}')
    assert "smaller than the codebook" in _error(original)


def test_heads_are_required_at_other_widths(original):
    message = _error(original, heads=None)
    assert "64" in message and "1408" in message and "--heads vision=4,merger=4,decoder=4" in message
    message = _error(original, heads={"vision": 4})
    assert "Missing: merger, decoder." in message
    assert "not a multiple" in _error(original, heads="vision=3,merger=4,decoder=4")
    assert "unknown part llm" in _error(original, heads="llm=3")


def test_parse_heads():
    assert parse_heads("vision=16, merger=8,decoder = 4") == {"vision": 16, "merger": 8, "decoder": 4}
    for text in ("vision", "vision=", "vision=a", "vision=1,vision=2", "vision=-1"):
        with pytest.raises(ConversionError):
            parse_heads(text)


def test_bad_options(original):
    assert "dtype" in _error(original, dtype="int8")
    assert "dtype" in _error(original, dtype="nonsense")
    assert "5GB" in _error(original, max_shard_size="5 apples")


def test_destination_is_never_overwritten(original, tmp_path):
    destination = tmp_path / "converted"
    destination.mkdir()
    (destination / "mine.txt").write_text("keep")
    assert "not empty" in _error(original)
    assert [path.name for path in destination.iterdir()] == ["mine.txt"]
    shutil.rmtree(destination)
    destination.write_text("keep")
    assert "not a directory" in _error(original)


def test_empty_destination_is_used(original, tmp_path):
    destination = tmp_path / "converted"
    destination.mkdir()
    convert(original, destination, heads=HEADS, progress=False)
    assert (destination / "config.json").is_file()


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("anything")]
)
def test_failure_half_way_leaves_nothing(original, monkeypatch, failure):
    from lavit_hf.conversion import weight_files

    save_file, calls = weight_files.save_file, []

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise failure
        save_file(*args, **kwargs)

    monkeypatch.setattr(weight_files, "save_file", fail_later)
    expected = ConversionError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left on device" if isinstance(failure, OSError) else None):
        convert(original, original.parent / "converted", heads=HEADS, max_shard_size="300KB", progress=False)
    assert [path.name for path in original.parent.iterdir()] == ["original"]


_FULL_DISK = """
import resource, signal, sys
from lavit_hf.conversion import ConversionError, convert, convert_to_original
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may grow further, as on a full disk
try:
    if sys.argv[1] == "forth":
        convert(sys.argv[2], sys.argv[3], heads="vision=4,merger=4,decoder=4", progress=False)
    else:
        convert_to_original(sys.argv[2], sys.argv[3], progress=False)
except ConversionError as error:
    print(error)
"""


@pytest.mark.parametrize("direction", ["forth", "back"])
def test_disk_that_fills_up(python, original_dir, checkpoint, tmp_path, direction):
    pytest.importorskip("resource")
    source = original_dir if direction == "forth" else checkpoint
    command = [python, "-c", _FULL_DISK, direction, str(source), str(tmp_path / "destination")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not be written" in result.stdout
    assert not list(tmp_path.iterdir())


def test_disk_without_room_is_noticed_first(original, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = _error(original)
    assert "1.0 KB are free" in message and "MB" in message


def test_to_original_needs_the_record(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConversionError, match="highres_pixel_decoding/unet: conv_in.weight"):
        convert_to_original(copy, tmp_path / "back", progress=False)
    shutil.rmtree(copy / "original")
    with pytest.raises(ConversionError, match="no original/layout.json"):
        convert_to_original(copy, tmp_path / "back", progress=False)
    with pytest.raises(ConversionError, match="not a directory"):
        convert_to_original(tmp_path / "nowhere", tmp_path / "back", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_truncated_converted_file(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConversionError, match="model.safetensors is corrupt"):
        convert_to_original(copy, tmp_path / "back", progress=False)


def test_safetensors_of_an_unsupported_type(original):
    to_safetensors(original / STAGE1)
    path = original / "visual_tokenizer/tokenizer_encoder.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({**load_file(path), "odd": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    message = _error(original)
    assert "F8_E4M3" in message and path.name in message


@pytest.fixture
def converted(checkpoint, tmp_path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "place" / "converted")
    return tmp_path / "place" / "converted"


def _change_layout(converted: Path, change) -> None:
    path = converted / "original" / "layout.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content).replace("{outside}", str(converted.parent)))


def _add_file(path: str, **entry):
    whole = {"weights": "language_model/model", "tensors": {}, **entry}
    return lambda layout: layout["files"].update({path: whole})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: layout["copied"].update({"../../victim/.bashrc": "NOTICE"}), "victim/.bashrc"),
        (lambda layout: layout["copied"].update({"{outside}/victim": "NOTICE"}), "place/victim"),
        (lambda layout: layout["copied"].update({"stolen": "/etc/passwd"}), "/etc/passwd"),
        (lambda layout: layout["copied"].update({"stolen": "../secret"}), "../secret"),
        (lambda layout: layout["copied"].update({"stolen": 5}), "5 where the path of a file"),
        (lambda layout: layout["copied"].update({".": "NOTICE"}), "'.' where the path of a file"),
        # Where `a` links to `b/c/d`, this is a file of the directory; where nothing does, it is not.
        (lambda layout: layout["copied"].update({"a/../../victim": "NOTICE"}), "a/../../victim"),
        (_add_file("../victim.bin"), "../victim.bin"),
        (_add_file("{outside}/victim.safetensors"), "place/victim"),
        (_add_file("x.bin", weights="pixel_decoding/../../secret"), "pixel_decoding/../../secret"),
        (_add_file("x.bin", weights="highres_pixel_decoding/../unet"), "highres_pixel_decoding/../unet"),
        (_add_file("x.bin", tensors={"a": "load"}), "a has the type 'load'"),
        (
            _add_file("x.bin", tensors=["a"]),
            "`tensors` of x.bin has to be an object of names and values",
        ),
        (lambda layout: layout.update(unused=[]), "`unused` has to be an object of names and values, and is []"),
        (lambda layout: layout.update(copied=["a"]), "`copied` has to be an object of names and values, and is ['a']"),
        (lambda layout: layout.update(files=5), "`files` has to be an object of names and values, and is 5"),
    ],
)
def test_to_original_stays_in_its_directories(converted, tmp_path, change, message):
    (converted.parent / "secret").write_text("secret")
    (converted / "b" / "c" / "d").mkdir(parents=True)
    (converted / "a").symlink_to("b/c/d")
    _change_layout(converted, change)
    with pytest.raises(ConversionError, match="layout.json is damaged") as caught:
        convert_to_original(converted, tmp_path / "to" / "back", progress=False)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert sorted(path.name for path in converted.parent.iterdir()) == ["converted", "secret"]


def test_an_absolute_path_into_the_source_is_no_destination(converted, tmp_path):
    target = converted / "planted"
    _change_layout(converted, lambda layout: layout["copied"].update({str(target): "README.md"}))
    with pytest.raises(ConversionError, match="planted is no path within a directory"):
        convert_to_original(converted, tmp_path / "back", progress=False)
    assert not target.exists()


@pytest.mark.parametrize("name", ["LICENSE", "language_model/LICENSE", "language_model/secret.json", "pixel_decoding"])
def test_links_out_of_the_source_are_refused(original, name):
    secret = original.parent / "secret"
    secret.write_text("{}")
    path = original / name
    if path.is_dir():
        shutil.move(path, original.parent / "decoder")
        secret = original.parent / "decoder"
    path.symlink_to(secret)
    assert f"has {name}, which links to {secret} outside of it" in _error(original)


def test_links_within_the_source_are_followed(original):
    (original / "language_model/LICENSE").write_text("terms")
    (original / "LICENSE").symlink_to("language_model/LICENSE")
    destination = convert(original, original.parent / "converted", heads=HEADS, progress=False)
    assert (destination / "LICENSE").read_text() == "terms" and not (destination / "LICENSE").is_symlink()


def test_links_out_of_a_converted_directory_are_refused(converted, tmp_path):
    path = converted / "original/language_model/tokenizer.model"
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ConversionError, match="tokenizer.model, which links to /etc/passwd"):
        convert_to_original(converted, tmp_path / "back", progress=False)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", 7, ["a"]])
def test_shards_are_beside_their_index(original, name):
    shard_language_model(original)
    (original / "secret.bin").write_bytes(b"")
    index = original / "language_model/pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    message = _error(original)
    assert "pytorch_model.bin.index.json" in message and str(name) in message


@pytest.mark.skipif(os.name == "nt", reason="locks")
def test_what_a_killed_conversion_left_is_cleaned_by_the_next(original):
    left = original.parent / ".converted.abcd1234.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert(original, original.parent / "converted", heads=HEADS, progress=False)
    assert sorted(path.name for path in original.parent.iterdir()) == ["converted", "original"]
