"""LavitVisualTokenizer: selection, branches, precision, loading."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lavit_hf import LavitForConditionalGeneration, LavitModel, LavitVisualTokenizer
from lavit_hf.modeling.modeling_lavit_visual_tokenizer import select_patches
from tiny_models import NUM_PATCHES, build_model, build_visual_tokenizer, random_pixels, visual_tokenizer_config


@pytest.fixture(scope="module")
def tokenizer() -> LavitVisualTokenizer:
    return build_visual_tokenizer()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return random_pixels(4)


def test_encode_returns_what_it_documents(tokenizer, pixels):
    output = tokenizer.encode(pixels)
    total = int(output.num_tokens.sum())
    assert 0 < total < 4 * NUM_PATCHES
    assert output.codes.shape == (total,) and output.codes.dtype == torch.long
    assert output.keep_mask.shape == (4, NUM_PATCHES) and output.keep_mask.dtype == torch.bool
    assert output.selector_log_probs.shape == (4, NUM_PATCHES, 2)
    assert output.features.shape == (total, 32)
    assert output.pre_quantized.shape == (total, 6)
    assert output.patch_features.shape == (4, NUM_PATCHES, 32)
    assert torch.equal(output.num_tokens, output.keep_mask.sum(dim=-1))
    assert torch.equal(output.keep_mask, output.selector_log_probs[..., 0] > output.selector_log_probs[..., 1])


def test_embed_is_the_other_branch_without_codes(tokenizer, pixels):
    output = tokenizer.embed(pixels)
    assert output.codes is None and output.pre_quantized is None
    assert not torch.equal(output.selector_log_probs, tokenizer.encode(pixels).selector_log_probs)


def test_shared_branches(pixels):
    tokenizer = build_visual_tokenizer(share_branches=True)
    assert not any(name.startswith("continuous") for name in tokenizer.state_dict())
    torch.testing.assert_close(tokenizer.embed(pixels).features, tokenizer.encode(pixels).features)


def test_images_do_not_influence_one_another(tokenizer, pixels):
    output = tokenizer.encode(pixels)
    for index, features in enumerate(output.features.split(output.num_tokens.tolist())):
        torch.testing.assert_close(tokenizer.encode(pixels[index : index + 1]).features, features, atol=1e-5, rtol=0)


# Ties are frequent among so few values.
_LOG_ODDS = st.lists(st.sampled_from([-8.0, -1.0, -0.5, 0.0, 0.25, 1.0, 40.0]), min_size=9, max_size=9)


def _scores(rows: list[list[float]]) -> torch.Tensor:
    log_odds = torch.tensor(rows)
    return torch.stack([log_odds, torch.zeros_like(log_odds)], dim=-1).log_softmax(dim=-1)


@settings(max_examples=200)
@given(rows=st.lists(_LOG_ODDS, min_size=1, max_size=4), data=st.data())
def test_budgets(rows, data):
    """Exact, nested, of the likeliest patches, the same every time and in every batch."""
    scores = _scores(rows)
    small, large = sorted(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=2)))
    kept, more = select_patches(scores, num_tokens=small), select_patches(scores, num_tokens=large)
    assert kept.sum(dim=-1).tolist() == [small] * len(rows) and more.sum(dim=-1).tolist() == [large] * len(rows)
    assert not (kept & ~more).any()
    for row, mask in zip(rows, kept.tolist(), strict=True):
        # Of equal ones the first.
        likeliest = sorted(range(9), key=lambda patch: (-row[patch], patch))[:small]
        assert [patch for patch, is_kept in enumerate(mask) if is_kept] == sorted(likeliest)
    counts = data.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
    mixed = select_patches(scores, num_tokens=counts)
    for index, count in enumerate(counts):
        alone = select_patches(scores[index : index + 1], num_tokens=count)
        assert torch.equal(mixed[index : index + 1], alone)
        assert torch.equal(alone, select_patches(scores[index : index + 1], num_tokens=torch.tensor([count])))
    assert select_patches(scores, num_tokens=9).all()


@settings(max_examples=200)
@given(rows=st.lists(_LOG_ODDS, min_size=1, max_size=4))
def test_expected_selection(rows):
    """As many as sampling keeps on average, at least one, whatever else is in the batch."""
    scores = _scores(rows)
    kept = select_patches(scores, selection="expected")
    for index, row in enumerate(rows):
        expected = sum(1 / (1 + math.exp(-value)) for value in row)
        count = int(kept[index].sum())
        assert abs(count - expected) <= 0.5 + 1e-5 or (count == 1 and expected < 0.5)
        assert torch.equal(kept[index], select_patches(scores[index : index + 1], num_tokens=count)[0])
        assert torch.equal(kept[index], select_patches(scores[index : index + 1], selection="expected")[0])


def test_expected_selection_keeps_what_argmax_drops():
    """Where no patch is likelier kept than dropped, argmax leaves nothing of the image, and the original a third."""
    scores = _scores([[-0.7] * 9])
    assert not select_patches(scores).any()
    assert select_patches(scores, selection="expected").sum() == 3


def test_keep_rates():
    scores = _scores([[float(patch) for patch in range(9)]])
    counts = [int(select_patches(scores, keep_rate=rate).sum()) for rate in (0.01, 0.25, 0.5, 1.0)]
    assert counts == [1, 2, 4, 9]


def test_a_prior_moves_tokens():
    scores = _scores([[0.5, -0.5, 0.25, -3.0]])
    prior = torch.tensor([[-1.0, 1.0, 0.0, 0.0]])
    assert select_patches(scores).tolist() == [[True, False, True, False]]
    assert select_patches(scores, log_prior=prior).tolist() == [[False, True, True, False]]
    assert select_patches(scores, log_prior=prior, num_tokens=1).tolist() == [[False, True, False, False]]
    always = torch.full((1, 4), 1e4)
    generator = torch.Generator().manual_seed(0)
    assert select_patches(scores, generator, log_prior=always).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "1 to 4 tokens, as it has 4 patches; got 0"),
        ({"num_tokens": 5}, "1 to 4 tokens"),
        ({"num_tokens": [1, 2]}, "2 numbers of tokens for 1 images"),
        ({"num_tokens": 1.5}, "an integer"),
        ({"num_tokens": True}, "an integer"),
        ({"num_tokens": 1, "keep_rate": 0.5}, "either num_tokens or keep_rate"),
        ({"keep_rate": 0.0}, "more than 0"),
        ({"keep_rate": 1.5}, "at most 1"),
        ({"keep_rate": math.nan}, "more than 0"),
        ({"selection": "best"}, "argmax, expected, sample; got 'best'"),
        ({"selection": "sample"}, "which needs one"),
        ({"generator": torch.Generator(), "selection": "argmax"}, "for selection='sample'"),
        ({"generator": torch.Generator(), "num_tokens": 1}, "none by chance"),
        ({"log_prior": torch.zeros(1, 3)}, r"of shape \[1, 4\]"),
        ({"log_prior": torch.full((1, 4), math.nan)}, "finite"),
    ],
)
def test_choices_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        select_patches(_scores([[0.0, 1.0, 2.0, 3.0]]), **options)


def test_budgets_of_both_branches(tokenizer, pixels):
    for method in (tokenizer.encode, tokenizer.embed):
        output = method(pixels, num_tokens=[1, 3, 5, NUM_PATCHES])
        assert output.num_tokens.tolist() == [1, 3, 5, NUM_PATCHES]
        alone = method(pixels[2:3], num_tokens=5)
        torch.testing.assert_close(output.features.split([1, 3, 5, NUM_PATCHES])[2], alone.features)
        wanted = select_patches(alone.selector_log_probs, num_tokens=5)
        assert torch.equal(alone.keep_mask, wanted) and torch.equal(output.keep_mask[2:3], wanted)
        with pytest.raises(ValueError, match="leave num_tokens out"):
            method(pixels, keep_mask=output.keep_mask, num_tokens=1)


def test_the_configuration_chooses(pixels):
    tokenizer = build_visual_tokenizer(selection="expected")
    output = tokenizer.encode(pixels)
    assert torch.equal(output.keep_mask, select_patches(output.selector_log_probs, selection="expected"))
    argmax = tokenizer.encode(pixels, selection="argmax").keep_mask
    assert torch.equal(argmax, select_patches(output.selector_log_probs)) and not torch.equal(argmax, output.keep_mask)
    generator = torch.Generator().manual_seed(0)
    assert tokenizer.encode(pixels, generator).keep_mask.shape == argmax.shape
    with pytest.raises((ValueError, StrictDataclassError), match="'argmax' or 'expected', got 'sample'"):
        build_visual_tokenizer(selection="sample")


def test_keep_mask_overrides_the_selector(tokenizer, pixels):
    mask = torch.zeros(4, NUM_PATCHES, dtype=torch.bool)
    mask[:, ::5] = True
    output = tokenizer.encode(pixels, keep_mask=mask)
    assert output.num_tokens.tolist() == [4] * 4 and torch.equal(output.keep_mask, mask)
    with pytest.raises(ValueError, match="leave generator out"):
        tokenizer.encode(pixels, keep_mask=mask, generator=torch.Generator())


@pytest.mark.parametrize("mask", [torch.ones(4, NUM_PATCHES), torch.ones(3, NUM_PATCHES, dtype=torch.bool)])
def test_wrong_keep_mask_is_refused(tokenizer, pixels, mask):
    with pytest.raises(ValueError, match="keep_mask must be boolean"):
        tokenizer.encode(pixels, keep_mask=mask)


def test_sampling_follows_the_generator_alone(tokenizer, pixels):
    state = torch.get_rng_state()
    first = tokenizer.encode(pixels, generator=torch.Generator().manual_seed(3))
    again = tokenizer.encode(pixels, generator=torch.Generator().manual_seed(3))
    other = tokenizer.encode(pixels, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first.keep_mask, again.keep_mask)
    assert not torch.equal(first.keep_mask, other.keep_mask)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_one_generator_per_image(tokenizer, pixels):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batched = tokenizer.encode(pixels, generator=generators).keep_mask
    alone = tokenizer.encode(pixels[2:3], generator=[torch.Generator().manual_seed(2)]).keep_mask
    assert torch.equal(batched[2:3], alone)
    with pytest.raises(ValueError, match="generators"):
        tokenizer.encode(pixels, generator=generators[:2])


def test_sampling_follows_the_probabilities(tokenizer, pixels):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rate = sum(tokenizer.encode(pixels, generator=generator).keep_mask.float() for _ in range(200)) / 200
        expected = tokenizer.encode(pixels).selector_log_probs[..., 0].exp()
    assert (rate - expected).abs().max() < 0.15


def test_nan_pixels_are_refused(tokenizer, pixels):
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(pixels * float("nan"))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 16, 16), (0, 3, 16, 16)])
def test_wrong_image_size_is_refused(tokenizer, shape):
    with pytest.raises(ValueError, match="image processor"):
        tokenizer.encode(torch.zeros(shape))


@pytest.mark.parametrize("name", ["codebook_size", "merger_num_layers"])
def test_numpy_integers_are_refused_by_name(name):
    """As transformers does for every configuration: they cannot be written to JSON."""
    with pytest.raises(StrictDataclassError, match=f"{name}.*expected int, got int64"):
        visual_tokenizer_config(**{name: np.int64(2)})


def test_pixels_of_any_precision(tokenizer, pixels):
    narrow = pixels.to(torch.float8_e4m3fn)
    for method in (tokenizer.encode, tokenizer.embed):
        assert torch.equal(method(narrow).features, method(narrow.float()).features)


def test_pixels_without_values_are_refused(tokenizer, pixels):
    for model in (tokenizer, copy.deepcopy(tokenizer).to("meta")):
        for method in (model.encode, model.embed):
            with pytest.raises(ValueError, match="hold no values .*the device meta"):
                method(pixels.to("meta"))


def test_selection_is_in_fp32_under_autocast_and_in_half_precision(tokenizer, pixels):
    features = tokenizer.get_patch_features(pixels)
    expected = tokenizer.discrete.selector(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tokenizer.discrete.selector(features), expected)
    half = build_visual_tokenizer().to(torch.bfloat16)
    upcast = build_visual_tokenizer().to(torch.bfloat16).to(torch.float32)
    scores = half.discrete.selector(features)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, upcast.discrete.selector(features))


def test_half_precision_model_runs(pixels):
    tokenizer = build_visual_tokenizer().to(torch.bfloat16)
    for output in (tokenizer.encode(pixels), tokenizer.embed(pixels)):
        assert output.features.dtype == torch.bfloat16 and output.features.isfinite().all()


def test_loading_in_half_precision_keeps_selectors_and_codebook(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = LavitVisualTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.discrete.selector.in_proj.weight.dtype == torch.float32
    assert torch.equal(loaded.discrete.quantizer.codebook.weight, tokenizer.discrete.quantizer.codebook.weight)


@pytest.mark.parametrize(
    "vision_config",
    [
        {"model_type": "clip_vision_model"},
        {"model_type": "siglip_vision_model"},
        {"model_type": "dinov2"},
        {"model_type": "vit"},
    ],
)
def test_any_vision_model_can_be_the_encoder(vision_config, pixels):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = build_visual_tokenizer(vision_config={**vision_config, **sizes, "image_size": 16, "patch_size": 4})
    output = tokenizer.encode(pixels)
    assert output.patch_features.shape == (4, NUM_PATCHES, 32) and output.features.isfinite().all()


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, first), (_, second) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(first, second), name


def test_save_and_load_is_lossless(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded, info = LavitVisualTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(tokenizer, loaded)
    assert_same_weights(tokenizer, AutoModel.from_pretrained(tmp_path))
    assert loaded.name_or_path == str(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["10GB", "40KB"])
@pytest.mark.parametrize("part", [LavitForConditionalGeneration, LavitModel])
def test_loads_its_part_of_a_whole_checkpoint(tmp_path, caplog, max_shard_size, part):
    model = build_model()
    whole = model if part is LavitForConditionalGeneration else model.model
    whole.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = LavitVisualTokenizer.from_pretrained(tmp_path)
    assert_same_weights(model.visual_tokenizer, loaded)
    assert not caplog.records, "loading must not report the rest of the checkpoint"


def test_needs_no_shard_of_the_language_model(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in weight_map.items() if ".visual_tokenizer." in name}
    others = set(weight_map.values()) - needed
    assert others
    for shard in others:
        (tmp_path / shard).unlink()
    assert_same_weights(model.visual_tokenizer, LavitVisualTokenizer.from_pretrained(tmp_path))


def test_a_missing_tensor_is_an_error(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["discrete.merger.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"discrete\.merger\.norm\.weight"):
        LavitVisualTokenizer.from_pretrained(tmp_path)


def test_a_corrupt_file_is_an_error_that_names_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"model\.safetensors is not a readable"):
        LavitVisualTokenizer.from_pretrained(tmp_path)


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(OSError, match="does not appear to have"):
        LavitVisualTokenizer.from_pretrained(tmp_path)


def test_configuration_values_can_be_overridden(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = LavitVisualTokenizer.from_pretrained(tmp_path, attention_smoothing=0)
    assert loaded.config.attention_smoothing == 0 and loaded.discrete.merger.smoothing == 0


def test_variants_are_found(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(tokenizer, LavitVisualTokenizer.from_pretrained(tmp_path, variant="fp16"))


def test_a_subfolder_works(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "part")
    assert_same_weights(tokenizer, LavitVisualTokenizer.from_pretrained(tmp_path, subfolder="part"))
    shutil.rmtree(tmp_path / "part")


def test_gradient_checkpointing_changes_no_gradient(pixels):
    gradients = []
    for checkpointing in (False, True):
        tokenizer = build_visual_tokenizer().train()
        if checkpointing:
            tokenizer.gradient_checkpointing_enable()
        tokenizer.embed(pixels).features.square().sum().backward()
        gradients.append(tokenizer.continuous.merger.layers[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "values", [{"merger_num_heads": 5}, {"merger_num_heads": 0}, {"attention_smoothing": -1.0}, {"codebook_size": "a"}]
)
def test_impossible_configurations_are_refused(values):
    with pytest.raises(StrictDataclassError, match=next(iter(values))):
        visual_tokenizer_config(**values)


def test_encoding_with_everything_offloaded(tokenizer, pixels):
    """Regression: the codebook's weights were read where a hook had not loaded them."""
    expected = tokenizer.encode(pixels)
    offloaded = cpu_offload(build_visual_tokenizer(), torch.device("cpu"))
    assert torch.equal(offloaded.encode(pixels).codes, expected.codes)


def test_vision_models_without_one_feature_per_patch_are_refused():
    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    }
    tokenizer = LavitVisualTokenizer(visual_tokenizer_config(vision_config={"model_type": "swin", **sizes}))
    with pytest.raises(ValueError, match="plain ViT"):
        tokenizer.encode(random_pixels(1))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_shards_are_beside_their_index(tmp_path, name):
    build_model().save_pretrained(tmp_path / "lavit", max_shard_size="100KB")
    path = tmp_path / "lavit" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    path.write_text(json.dumps(content))
    with pytest.raises(
        OSError, match=f"index.json is no index of weights: '{name}' is not the name of a file beside it"
    ):
        LavitVisualTokenizer.from_pretrained(tmp_path / "lavit")


@pytest.mark.parametrize("smoothing", [0.0, 1e-6])
def test_the_parts_of_embed_compile_in_one_graph_each(smoothing):
    """What lies between them looks at how many patches are kept, and cannot."""
    torch._dynamo.reset()
    tokenizer = build_visual_tokenizer(attention_smoothing=smoothing)
    pixels = random_pixels(3)
    with torch.no_grad():
        expected = [tokenizer.embed(some) for some in (pixels, pixels[:1])]
        branch = tokenizer.continuous or tokenizer.discrete
        for part in (tokenizer.vision_model, branch.selector, *branch.merger.layers):
            part.compile(backend="eager", fullgraph=True)
        for some, output in zip((pixels, pixels[:1]), expected, strict=True):
            compiled = tokenizer.embed(some)
            assert torch.equal(compiled.keep_mask, output.keep_mask)
            torch.testing.assert_close(compiled.features, output.features)


def test_a_quantized_part_is_refused(tmp_path):
    """Regression: integers were taken for the weights themselves, and all codes were others."""
    build_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "visual_tokenizer" in name and weights[name].ndim == 2)
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is quantized \(I8\); visual_tokenizer alone cannot be loaded"):
        LavitVisualTokenizer.from_pretrained(tmp_path)
