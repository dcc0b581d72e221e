"""Converting there and back: every tensor bit-equal, whatever the source's dtypes, formats and shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.original_variants import (
    ENCODER,
    HEADS,
    LANGUAGE_MODEL,
    STAGE1,
    STAGE2,
    assert_same_weights,
    copy_original,
    edit,
    load,
    shard_language_model,
    to_half,
    to_safetensors,
    weight_files,
)
from lavit_hf.conversion import convert, convert_to_original


@pytest.fixture
def original(original_dir: Path, tmp_path: Path) -> Path:
    return copy_original(original_dir, tmp_path / "original")


def _round_trip(original: Path, **options) -> Path:
    converted = convert(original, original.parent / "converted", heads=HEADS, progress=False, **options)
    back = convert_to_original(converted, original.parent / "back", progress=False)
    assert_same_weights(original, back)
    return converted


def _root_weights(converted: Path) -> dict[str, torch.Tensor]:
    files = list(converted.glob("model*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_reference_checkpoint_comes_back_whole(original):
    _round_trip(original)
    before = {path.relative_to(original) for path in original.rglob("*") if path.is_file()}
    back = original.parent / "back"
    assert {path.relative_to(back) for path in back.rglob("*") if path.is_file()} == before
    for path in before:
        if path.suffix not in (".bin", ".safetensors"):
            assert (original / path).read_bytes() == (back / path).read_bytes()


def test_nothing_is_left_beside_the_destination(original):
    _round_trip(original)
    assert sorted(path.name for path in original.parent.iterdir()) == ["back", "converted", "original"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_and_shards(original, dtype):
    to_half(original, dtype)
    shard_language_model(original)
    converted = _round_trip(original)
    assert json.loads((converted / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    weights = _root_weights(converted)
    assert weights["lm_head.weight"].dtype == dtype
    assert weights["model.language_model.norm.weight"].dtype == torch.float32


def test_biases_of_different_dtypes_are_packed_without_loss(original):
    edit(original / ENCODER, lambda t: t.update({"blocks.1.attn.q_bias": t["blocks.1.attn.q_bias"].half()}))
    weights = _root_weights(_round_trip(original))
    bias = weights["model.visual_tokenizer.vision_model.encoder.layers.1.self_attn.qkv.bias"]
    source = load(original / ENCODER)
    query, key, value = bias.chunk(3)
    assert torch.equal(query, source["blocks.1.attn.q_bias"].float())
    assert not key.any()
    assert torch.equal(value, source["blocks.1.attn.v_bias"])


def test_safetensors_everywhere(original):
    for name in weight_files(original):
        if name == LANGUAGE_MODEL:
            to_safetensors(original / name, "model.safetensors")
        elif "uncond" not in name:
            to_safetensors(original / name)
    _round_trip(original)


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards_without_an_index(original, ending):
    shard_language_model(original, ending, index=False)
    _round_trip(original)


def test_safetensors_are_preferred(original):
    tensors = load(original / LANGUAGE_MODEL)
    to_safetensors(original / LANGUAGE_MODEL, "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, original / LANGUAGE_MODEL)
    converted = convert(original, original.parent / "converted", heads=HEADS, progress=False)
    assert torch.equal(_root_weights(converted)["lm_head.weight"], tensors["lm_head.weight"])


def test_pickles_of_old_torch_versions(original):
    tensors = load(original / STAGE1)
    torch.save(tensors, original / STAGE1, _use_new_zipfile_serialization=False)
    _round_trip(original)


def test_sharded_output_has_the_index_of_transformers(original):
    converted = _round_trip(original, max_shard_size="300KB")
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in converted.glob("model-*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert all((converted / file).stat().st_size < 330_000 for file in files)
    weights = _root_weights(converted)
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert (converted / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()


def test_continuous_selector_falls_back_to_stage_1(original):
    def drop_selector(tensors):
        for name in [name for name in tensors if name.startswith("token_predictor.")]:
            del tensors[name]

    edit(original / STAGE2, drop_selector)
    weights = _root_weights(_round_trip(original))
    name = "model.visual_tokenizer.{}.selector.in_proj.weight"
    assert torch.equal(weights[name.format("continuous")], weights[name.format("discrete")])


def test_stage_2_lies_over_stage_1_tensor_by_tensor(original):
    edit(original / STAGE2, lambda t: [t.pop(name) for name in list(t) if ".blocks.0." in name])
    weights = _root_weights(_round_trip(original))
    name = "model.visual_tokenizer.{}.merger.layers.{}.mlp.fc1.weight"
    assert torch.equal(weights[name.format("continuous", 0)], weights[name.format("discrete", 0)])
    assert not torch.equal(weights[name.format("continuous", 1)], weights[name.format("discrete", 1)])


def test_projection_may_come_from_stage_1_only(original):
    projection = {name: tensor for name, tensor in load(original / STAGE2).items() if name.startswith("vit_proj.")}
    edit(original / STAGE1, lambda t: t.update(projection))
    edit(original / STAGE2, lambda t: [t.pop(name) for name in projection])
    weights = _root_weights(_round_trip(original))
    assert torch.equal(weights["model.multi_modal_projector.weight"], projection["vit_proj.weight"])


def test_extra_tensors_of_stage_1_are_kept_aside(original):
    encoder = {f"encoder.{name}": tensor for name, tensor in load(original / ENCODER).items()}
    extra = {
        "vit_proj.weight": torch.randn(48, 64),
        "vit_proj.bias": torch.randn(48),
        "quantize.cluster_size": torch.ones(64),
    }
    edit(original / STAGE1, lambda t: t.update({**encoder, **extra}))
    converted = _round_trip(original)
    aside = {name.partition("/")[2].partition("/")[2] for name in load_file(converted / "original/unused.safetensors")}
    # An encoder equal to the encoder's own file is not stored a second time.
    assert extra.keys() <= aside
    assert "encoder.blocks.0.norm1.weight" not in aside
    assert torch.equal(
        _root_weights(converted)["model.multi_modal_projector.weight"], load(original / STAGE2)["vit_proj.weight"]
    )


def test_stage_1_encoder_wins_over_the_encoder_file(original):
    patched = load(original / ENCODER)["blocks.0.norm1.weight"] + 1
    edit(original / STAGE1, lambda t: t.update({"encoder.blocks.0.norm1.weight": patched}))
    weights = _root_weights(_round_trip(original))
    assert torch.equal(weights["model.visual_tokenizer.vision_model.encoder.layers.0.layer_norm1.weight"], patched)


def test_inverse_frequencies_are_kept_aside(original):
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit(original / LANGUAGE_MODEL, lambda t: t.update({name.format(n): torch.rand(6) for n in range(2)}))
    assert not any("inv_freq" in name for name in _root_weights(_round_trip(original)))


def test_tied_language_model(original):
    config = original / "language_model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    edit(original / LANGUAGE_MODEL, lambda t: t.pop("lm_head.weight"))
    converted = _round_trip(original)
    assert "lm_head.weight" not in _root_weights(converted)


def test_pixel_decoders_may_be_absent(original):
    import shutil

    for folder in ("pixel_decoding", "highres_pixel_decoding"):
        shutil.rmtree(original / folder)
    for name in ("tokenizer_decoder.bin", "highres_tokenizer_decoder.bin"):
        (original / "visual_tokenizer" / name).unlink()
    converted = convert(original, original.parent / "converted", heads="vision=4,merger=4", progress=False)
    assert not (converted / "unet").exists() and not (converted / "lowres").exists()
    assert_same_weights(original, convert_to_original(converted, original.parent / "back", progress=False))


def test_negative_condition_without_its_decoder_is_kept_aside(original):
    (original / "visual_tokenizer/tokenizer_decoder.bin").unlink()
    converted = _round_trip(original)
    assert "pixel_decoding/uncond_embeddings/uncond_embeddings" in load_file(converted / "original/unused.safetensors")
    assert not (converted / "lowres/model_index.json").exists()


def test_decoder_without_a_negative_condition(original):
    (original / "pixel_decoding/uncond_embeddings.bin").unlink()
    converted = _round_trip(original)
    assert json.loads((converted / "lowres/token_decoder/config.json").read_text())["num_negative_tokens"] == 0


def test_safety_checker_and_feature_extractor_are_kept(original):
    folder = original / "pixel_decoding/safety_checker"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(
        {"concept_embeds": torch.randn(3, 4), "position_ids": torch.arange(5)[None]}, folder / "pytorch_model.bin"
    )
    (original / "pixel_decoding/feature_extractor").mkdir()
    (original / "pixel_decoding/feature_extractor/preprocessor_config.json").write_text("{}")
    converted = _round_trip(original)
    assert (converted / "lowres/feature_extractor/preprocessor_config.json").is_file()
    assert load_file(converted / "lowres/safety_checker/model.safetensors").keys() == {
        "concept_embeds",
        "position_ids",
    }


def test_dtype_casts_model_and_token_decoders_only(original):
    edit(original / STAGE2, lambda t: t.update({"quantize.steps": torch.arange(3)}))
    converted = convert(original, original.parent / "converted", heads=HEADS, dtype="bfloat16", progress=False)
    for folder in (converted, converted / "token_decoder", converted / "lowres/token_decoder"):
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    unet = load_file(converted / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float32}
    back = convert_to_original(converted, original.parent / "back", progress=False)
    for name, tensor in load(original / LANGUAGE_MODEL).items():
        assert torch.equal(load(back / LANGUAGE_MODEL)[name], tensor.bfloat16())


def test_a_trained_model_can_be_written_back(original):
    from lavit_hf import LavitForConditionalGeneration

    converted = convert(original, original.parent / "converted", heads=HEADS, progress=False)
    model = LavitForConditionalGeneration.from_pretrained(converted)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(converted)
    back = convert_to_original(converted, original.parent / "back", progress=False)
    expected = load(original / LANGUAGE_MODEL)["lm_head.weight"] + 1
    assert torch.equal(load(back / LANGUAGE_MODEL)["lm_head.weight"], expected)


def test_a_branch_that_was_trained_apart_comes_back_in_stage_2(original):
    from lavit_hf import LavitForConditionalGeneration

    def share(tensors):
        for name in [name for name in tensors if name.startswith(("token_predictor.", "causal_encoder."))]:
            del tensors[name]

    edit(original / STAGE2, share)
    converted = _round_trip(original)
    model = LavitForConditionalGeneration.from_pretrained(converted)
    selector = model.visual_tokenizer.continuous.selector
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(1)
    model.save_pretrained(converted)
    back = convert_to_original(converted, original.parent / "trained", progress=False)
    before, after = load(original / STAGE2), load(back / STAGE2)
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"token_predictor"}
    again = convert(back, original.parent / "again", heads=HEADS, progress=False)
    expected, actual = _root_weights(converted), _root_weights(again)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_license_files_travel(original):
    (original / "LICENSE").write_text("community license")
    (original / "language_model/LICENSE").write_text("Llama 2 license")
    (original / "language_model/USE_POLICY.md").write_text("policy")
    converted = _round_trip(original)
    assert (converted / "LICENSE").read_text() == "community license"
    assert (converted / "language_model-LICENSE").read_text() == "Llama 2 license"
    assert (converted / "USE_POLICY.md").is_file() and not (converted / "NOTICE").exists()
    assert (original.parent / "back/language_model/LICENSE").read_text() == "Llama 2 license"


def test_license_files_of_parts_stay_with_them(original):
    """Regression: they were dropped."""
    (original / "highres_pixel_decoding/unet/LICENSE").write_text("Stable Diffusion license")
    (original / "pixel_decoding/vae/LICENSE.md").write_text("license of the VAE")
    converted = _round_trip(original)
    assert (converted / "unet/LICENSE").read_text() == "Stable Diffusion license"
    assert (converted / "lowres/vae/LICENSE.md").read_text() == "license of the VAE"
    assert not (converted / "LICENSE").exists() and "Llama 2" in (converted / "NOTICE").read_text()
    back = original.parent / "back"
    for name in ("highres_pixel_decoding/unet/LICENSE", "pixel_decoding/vae/LICENSE.md"):
        assert (back / name).read_text() == (original / name).read_text()


def test_a_notice_stands_in_for_missing_licenses(original):
    converted = _round_trip(original)
    assert "Llama 2" in (converted / "NOTICE").read_text()
    assert "license: other" in (converted / "README.md").read_text()
