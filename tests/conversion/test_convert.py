"""What conversion writes is what `from_pretrained` reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.original_variants import HEADS, copy_original, edit
from lavit_hf import LavitForConditionalGeneration, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.conversion import convert

diffusers = pytest.importorskip("diffusers")


def _assert_complete(report: dict) -> None:
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_model_loads_without_a_gap(checkpoint):
    model, report = LavitForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    _assert_complete(report)
    stored = load_file(checkpoint / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_visual_tokenizer_loads_from_shards_without_the_language_models(original_dir, tmp_path):
    converted = convert(original_dir, tmp_path / "converted", heads=HEADS, max_shard_size="300KB", progress=False)
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    visual = {shard for name, shard in index.items() if name.startswith("model.visual_tokenizer.")}
    for shard in set(index.values()) - visual:
        (converted / shard).unlink()
    LavitVisualTokenizer.from_pretrained(converted)


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


def test_sharded_unet_loads(original_dir, tmp_path):
    converted = convert(original_dir, tmp_path / "converted", heads=HEADS, max_shard_size="200KB", progress=False)
    diffusers.UNet2DConditionModel.from_pretrained(converted / "unet")


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
