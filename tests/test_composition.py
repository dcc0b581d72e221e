"""New LaVITs out of any vision encoder and any language model."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    LlamaForCausalLM,
)

from lavit_hf import ImageTextProcessor, LavitConfig, LavitForConditionalGeneration, LavitImageProcessorPil
from lavit_hf.modeling.cache_lavit import CACHE_NAME
from lavit_hf.modeling.configuration_lavit import LavitPreTrainingConfig
from lavit_hf.modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from tiny_models import build_visual_tokenizer, lavit_config, random_pixels, spread_selector
from tiny_parts import (
    CODES,
    TEXT_VOCAB,
    build_text_model,
    build_text_tokenizer,
    build_vision_model,
    save_dual,
    save_text,
    save_vision,
    vision_config,
)
from tiny_parts import text_config as language_config

# Decoders that differ where LaVIT touches them: names, tied heads, a bias, embeddings narrower than states, positions.
DECODERS = ["llama", "gpt2", "opt", "gemma", "phi", "bloom"]
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return {"vision": save_vision(root / "vision"), "text": save_text(root / "text")}


def combine(text_model="llama", **kwargs) -> LavitForConditionalGeneration:
    if isinstance(text_model, str):
        text_model = build_text_model(text_model)
    return LavitForConditionalGeneration.from_vision_text_pretrained(
        vision_model=build_vision_model(), text_model=text_model, **CODES, **kwargs
    )


def test_config_puts_the_visual_ids_behind_the_embedding_table():
    config = LavitConfig.from_vision_text_configs(vision_config(), language_config(), **CODES)
    assert config.text_config.vocab_size == TEXT_VOCAB + 2 + 24 + 1  # the last row is the placeholder's
    ids = (config.boi_token_id, config.eoi_token_id, config.visual_token_offset, config.image_token_id)
    assert ids == (TEXT_VOCAB, TEXT_VOCAB + 1, TEXT_VOCAB + 2, TEXT_VOCAB + 2 + 24)
    visual = config.visual_tokenizer_config
    assert (visual.num_patches, visual.hidden_size, visual.codebook_size) == (16, 32, 24)
    assert (visual.merger_num_heads, visual.merger_intermediate_size, visual.attention_smoothing) == (2, 48, 0)
    assert not visual.share_branches and not config.tie_word_embeddings and not config.lm_head_bias
    assert LavitConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_config_does_not_change_those_it_is_made_of():
    vision, text = vision_config(), language_config()
    before = vision.to_dict(), text.to_dict()
    LavitConfig.from_vision_text_configs(vision, text, **CODES)
    assert (vision.to_dict(), text.to_dict()) == before


def test_mlp_width_of_encoders_that_give_a_ratio():
    config = AutoConfig.for_model("dinov2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    assert (
        LavitConfig.from_vision_text_configs(
            config, language_config()
        ).visual_tokenizer_config.merger_intermediate_size
        == 4 * 32
    )


def test_config_takes_the_vision_part_of_a_dual_model():
    config = CLIPConfig(vision_config=vision_config("clip_vision_model").to_dict())
    joint = LavitConfig.from_vision_text_configs(config, language_config(), **CODES)
    assert joint.visual_tokenizer_config.vision_config.model_type == "clip_vision_model"


def test_config_of_a_trained_visual_tokenizer_is_kept():
    trained = lavit_config().visual_tokenizer_config
    joint = LavitConfig.from_vision_text_configs(trained, language_config())
    expected = {**trained.to_dict(), "share_branches": False}
    assert joint.visual_tokenizer_config.to_dict() == expected
    with pytest.raises(ValueError, match="has its own codebook_size"):
        LavitConfig.from_vision_text_configs(trained, language_config(), codebook_size=7)


def test_config_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="codebook_sise"):
        LavitConfig.from_vision_text_configs(vision_config(), language_config(), codebook_sise=7)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("convnext", {}, "ConvNextConfig has no hidden_size"),
        ("resnet", {}, "convolutional"),
        ("swin", {**SWIN, "image_size": 16}, "for each of the 64 patches"),
        ("vitdet", {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1}, "gives features of shape"),
        ("vit_mae", {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1}, "for each of the 16 patches"),
        ("siglip2_vision_model", {"num_hidden_layers": 1}, "no image_size"),
    ],
)
def test_vision_models_without_a_feature_per_patch_are_refused(model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        LavitConfig.from_vision_text_configs(AutoConfig.for_model(model_type, **overrides), language_config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(num_hidden_layers=1), "BertLMHeadModel is an encoder"),
        (BertConfig(num_hidden_layers=1, is_decoder=True), "more than a decoder and a linear head"),
        (AutoConfig.for_model("t5"), "encoder-decoder"),
        (AutoConfig.for_model("mamba", num_hidden_layers=1), "MambaForCausalLM has no attention"),
        (AutoConfig.for_model("xlstm", num_hidden_layers=1, embedding_dim=64), "no attention_mask"),
        (AutoConfig.for_model("openai-gpt", n_layer=1), f"OpenAIGPTModel takes no {CACHE_NAME}, which"),
        (AutoConfig.for_model("vit"), "no language model"),
        (AutoConfig.for_model("llava"), "multimodal"),
        (AutoConfig.for_model("modernbert-decoder", num_hidden_layers=1), "more than a decoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_language_models_other_than_plain_decoders_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LavitConfig.from_vision_text_configs(vision_config(), config)


def test_language_models_without_a_base_model_are_refused():
    class Whole(LlamaForCausalLM):
        base_model_prefix = "transformer"

    with pytest.raises(ValueError, match="Whole has no decoder apart from its head"):
        combine(Whole(build_text_model("llama").config))


def example(model, pixels):
    """Two rows with a light image each, the first padded on the left."""
    config = model.config
    image = [config.boi_token_id, *[config.image_token_id] * 16, config.eoi_token_id]
    input_ids = torch.tensor([[2, 2, *image, 5, 6, 7], [*image, 8, 9, 10, 11, 12]])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}


@pytest.mark.parametrize("model_type", DECODERS)
def test_keeps_its_text_trains_generates_saves_and_loads(model_type, tmp_path):
    text_model, ids = build_text_model(model_type), torch.tensor([[5, 6, 7, 8]])
    expected = text_model(input_ids=ids).logits
    model = combine(text_model)
    assert not model.training
    torch.testing.assert_close(model(input_ids=ids).logits[..., :TEXT_VOCAB], expected)

    spread_selector(model.visual_tokenizer)
    config, inputs = model.config, example(model, random_pixels(2))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == config.image_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    unreached = [name for name, value in model.named_parameters() if value.grad is None]
    assert all("visual_tokenizer" in name for name in unreached)
    optimizer.step()
    assert model.eval()(**inputs, labels=labels).loss < loss

    text = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    assert text.shape == (2, 3) and text.max() < config.boi_token_id
    prompts = torch.tensor([[2, 5, 6, config.boi_token_id], [5, 6, 7, config.boi_token_id]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    drawn = model.generate(
        input_ids=prompts, attention_mask=mask, generation_mode="image", guidance_scale=3.0, max_new_tokens=4
    )[:, 4:]
    assert config.boi_token_id < drawn[:, 0].min() and drawn[:, 0].max() < config.image_token_id

    model.save_pretrained(tmp_path)
    again, info = LavitForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == config.tie_word_embeddings


def test_a_language_model_that_ties_its_embeddings_can_be_untied(tmp_path):
    combine("gpt2", tie_word_embeddings=False).save_pretrained(tmp_path)
    model = LavitForConditionalGeneration.from_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    assert head is not table
    torch.testing.assert_close(head[:TEXT_VOCAB], table[:TEXT_VOCAB])


@pytest.mark.parametrize(("model_type", "is_tied"), [("llama", False), ("gpt2", True), ("phi", False)])
def test_new_rows_start_like_the_others(model_type, is_tied):
    text_model = build_text_model(model_type)
    expected = text_model.get_input_embeddings().weight.detach().mean(dim=0)
    model = combine(text_model)
    new_rows = model.get_input_embeddings().weight[TEXT_VOCAB:]
    assert model.config.tie_word_embeddings == is_tied and len(new_rows) == 27
    torch.testing.assert_close(new_rows.mean(dim=0), expected, atol=1e-3, rtol=0)
    # The head grows, too, its bias included, so that no visual id is likelier than a typical word.
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert logits[TEXT_VOCAB:].max() < logits[:TEXT_VOCAB].logsumexp(-1)


def test_rows_from_the_language_models_own_initialization():
    rows = combine(mean_resizing=False).get_input_embeddings().weight[TEXT_VOCAB:]
    assert rows.std(dim=0).mean().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("model_type", ["phi", "llama"])
def test_drawing_computes_the_logits_of_the_whole_head(model_type):
    model = combine(model_type)
    if model_type == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    ids, part = torch.tensor([[5, 6, model.config.boi_token_id]]), (TEXT_VOCAB + 1, TEXT_VOCAB + 26)
    expected = model(input_ids=ids).logits[..., slice(*part)]
    torch.testing.assert_close(model(input_ids=ids, vocab_slice=part).logits, expected)


def test_models_that_do_more_to_their_logits_are_refused():
    with pytest.raises(ValueError, match="not those of FalconH1ForCausalLM"):
        combine("falcon_h1")


def test_heads_that_are_no_linear_layer_are_refused():
    text_model = build_text_model()
    text_model.lm_head = torch.nn.Sequential(text_model.lm_head)
    with pytest.raises(ValueError, match="The head of LlamaForCausalLM is no linear layer but Sequential"):
        combine(text_model)


def test_parts_from_their_directories(folders):
    model = LavitForConditionalGeneration.from_vision_text_pretrained(folders["vision"], folders["text"], **CODES)
    expected = AutoModelForCausalLM.from_pretrained(folders["text"])
    actual = model.model.language_model.state_dict()["layers.1.mlp.up_proj.weight"]
    assert torch.equal(actual, expected.model.layers[1].mlp.up_proj.weight)
    pixels = random_pixels(2)
    expected = AutoModel.from_pretrained(folders["vision"])(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), expected)
    assert not any("pooler" in name for name, _ in model.named_parameters())
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_dtype_applies_to_everything_but_what_needs_fp32(folders):
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        folders["vision"], folders["text"], dtype=torch.bfloat16, **CODES
    )
    is_fp32 = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert is_fp32 and all("selector" in name or "codebook" in name for name in is_fp32)
    assert model.dtype == torch.bfloat16


def test_attention_is_computed_as_it_was_asked_for(folders):
    load = LavitForConditionalGeneration.from_vision_text_pretrained

    def implementations(model):
        parts = (model.visual_tokenizer.vision_model, model.model.language_model)
        assert parts[1].config is model.config.text_config
        return [part.config._attn_implementation for part in parts]

    every = load(folders["vision"], folders["text"], attn_implementation="eager", **CODES)
    assert implementations(every) == ["eager", "eager"]
    text = load(folders["vision"], folders["text"], text_attn_implementation="eager", **CODES)
    assert implementations(text) == ["sdpa", "eager"]
    vision = load(folders["vision"], folders["text"], vision_attn_implementation="eager", **CODES)
    assert implementations(vision) == ["eager", "sdpa"]


@pytest.mark.parametrize("model_type", ["clip", "siglip", "blip-2"])
def test_vision_encoders_of_dual_checkpoints(model_type, folders, tmp_path):
    save_dual(tmp_path, model_type)
    model = LavitForConditionalGeneration.from_vision_text_pretrained(tmp_path, folders["text"], **CODES)
    pixels = random_pixels(2)
    encoder = AutoModel.from_pretrained(tmp_path).eval().vision_model
    if model_type == "blip-2":
        encoder.post_layernorm = torch.nn.Identity()  # LaVIT reads the raw residual stream.
    expected = encoder(pixel_values=pixels).last_hidden_state[:, -16:]
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), expected)
    assert not any(".head." in name for name, _ in model.named_parameters())


def test_register_tokens_are_no_patches(folders, tmp_path):
    save_vision(tmp_path, "dinov2_with_registers", num_register_tokens=4)
    model = LavitForConditionalGeneration.from_vision_text_pretrained(tmp_path, folders["text"], **CODES)
    pixels = random_pixels(2)
    states = AutoModel.from_pretrained(tmp_path)(pixel_values=pixels).last_hidden_state
    assert states.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), states[:, 5:])


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_other_image_sizes_interpolate_positions(model_type, folders, tmp_path):
    save_vision(tmp_path, model_type, image_size=32)
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        tmp_path, folders["text"], vision_image_size=16, **CODES
    )
    assert model.config.visual_tokenizer_config.num_patches == 16
    pixels = random_pixels(2)
    # DINOv2 interpolates by itself, in every call.
    expected = AutoModel.from_pretrained(tmp_path)(pixel_values=pixels).last_hidden_state[:, -16:]
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), expected, atol=1e-5, rtol=1e-4)


def test_image_size_of_encoders_with_a_flat_table_of_positions(folders, tmp_path):
    save_vision(tmp_path, "siglip_vision_model")
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        tmp_path, folders["text"], vision_image_size=24, **CODES
    )
    assert model.config.visual_tokenizer_config.num_patches == 36
    encoder = AutoModel.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = encoder(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model.visual_tokenizer.get_patch_features(pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["object", "folder", "first argument", "whole model", "stage 1"])
def test_a_trained_visual_tokenizer_keeps_its_codes(form, folders, tmp_path):
    trained = build_visual_tokenizer(share_branches=True)
    trained.save_pretrained(tmp_path)
    first, visual_tokenizer = None, {"object": trained, "folder": tmp_path}.get(form)
    if form == "first argument":
        first = tmp_path
    if form == "stage 1":
        stage_1 = LavitVisualTokenizerForPreTraining(
            LavitPreTrainingConfig(visual_tokenizer_config=trained.config.to_dict())
        )
        stage_1.visual_tokenizer.load_state_dict(trained.state_dict())
        visual_tokenizer = tmp_path / "stage 1"
        stage_1.save_pretrained(visual_tokenizer)
    if form == "whole model":
        visual_tokenizer = LavitForConditionalGeneration.from_vision_text_pretrained(tmp_path, folders["text"])
    model = LavitForConditionalGeneration.from_vision_text_pretrained(
        first, folders["text"], visual_tokenizer=visual_tokenizer
    )
    pixels = random_pixels(4)
    assert torch.equal(model.visual_tokenizer.encode(pixels).codes, trained.encode(pixels).codes)
    # Its one branch serves both purposes at first; then stage 2 trains a copy, so that codes keep their meaning.
    torch.testing.assert_close(model.visual_tokenizer.embed(pixels).features, trained.embed(pixels).features)
    copied = model.visual_tokenizer.continuous.merger.norm.weight
    assert copied.data_ptr() != model.visual_tokenizer.discrete.merger.norm.weight.data_ptr()


def test_two_branches_are_kept_or_dropped(folders):
    trained = build_visual_tokenizer()
    load = LavitForConditionalGeneration.from_vision_text_pretrained
    both = load(None, folders["text"], visual_tokenizer=trained).visual_tokenizer
    pixels = random_pixels(4)
    torch.testing.assert_close(both.embed(pixels).features, trained.embed(pixels).features)
    shared = load(None, folders["text"], visual_tokenizer=trained, share_branches=True).visual_tokenizer
    assert shared.continuous is None
    torch.testing.assert_close(shared.embed(pixels).features, trained.encode(pixels).features)


def test_arguments_that_do_not_make_a_model(folders):
    load = LavitForConditionalGeneration.from_vision_text_pretrained
    vision, text = folders["vision"], folders["text"]
    with pytest.raises(ValueError, match="exactly one of"):
        load(vision, text, visual_tokenizer=build_visual_tokenizer())
    with pytest.raises(ValueError, match="exactly one of"):
        load(None, text)
    with pytest.raises(ValueError, match="Pass the language model"):
        load(vision)
    with pytest.raises(TypeError, match="must be a language model with a head"):
        load(vision, text_model=build_text_model().model)
    with pytest.raises(TypeError, match="no LavitVisualTokenizer"):
        load(None, text, visual_tokenizer=build_vision_model())
    with pytest.raises(ValueError, match="holds no LavitVisualTokenizer"):
        load(None, text, visual_tokenizer=vision)
    with pytest.raises(TypeError, match="Expected a vision model"):
        load(None, text, vision_model="a name")
    with pytest.raises(TypeError, match="codebook_sise"):
        load(vision, text, codebook_sise=3)


def test_checkpoints_without_the_vision_encoder_are_refused(folders, tmp_path):
    save_vision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((Path(folders["text"]) / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="lacks weights of its vision encoder"):
        LavitForConditionalGeneration.from_vision_text_pretrained(tmp_path, folders["text"], **CODES)


# The processor, out of a vision encoder's image processor and a language model's tokenizer.

build = ImageTextProcessor.from_vision_text_pretrained


@pytest.fixture(scope="module")
def parts(folders):
    return folders["vision"], folders["text"]


@pytest.fixture(scope="module")
def config() -> LavitConfig:
    return LavitConfig.from_vision_text_configs(vision_config(), language_config(), **CODES)


def test_ids_follow_the_embedding_table_not_the_tokenizer(parts, config):
    text_tokenizer = AutoTokenizer.from_pretrained(parts[1])
    assert len(text_tokenizer) < TEXT_VOCAB
    tokenizer = build(*parts, config=config).tokenizer
    ids = (tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.visual_token_offset, tokenizer.image_token_id)
    assert ids == (config.boi_token_id, config.eoi_token_id, config.visual_token_offset, config.image_token_id)
    assert tokenizer.codebook_size == CODES["codebook_size"]
    text = "a red circle</s>"
    assert tokenizer("a red circle").input_ids == text_tokenizer("a red circle", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "</s>", 128)


def test_image_processor_has_the_encoders_statistics_and_lavits_shape(parts, config):
    processor = build(*parts, config=config)
    images = processor.image_processor
    assert isinstance(images, LavitImageProcessorPil)
    assert (list(images.image_mean), list(images.image_std), images.resample) == ([0.5] * 3, [0.25] * 3, 2)
    assert dict(images.size) == {"height": 16, "width": 16} and processor.image_seq_length == 16
    pixels = images(Image.new("RGB", (40, 10), "white"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, 16, 16), 2.0))


def test_without_a_configuration_it_is_made_of_the_models(parts, config):
    processor = build(*parts, codebook_size=24, visual_mode="discrete")
    assert processor.tokenizer.image_token_id == config.image_token_id and processor.visual_mode == "discrete"


def test_objects_instead_of_directories(parts, config):
    expected = build(*parts, config=config)
    processor = build(
        config=config, image_processor=LavitImageProcessorPil(image_mean=[0.1] * 3), tokenizer=build_text_tokenizer()
    )
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert list(processor.image_processor.image_mean) == [0.1] * 3
    assert processor.image_processor.size["height"] == 16


def test_model_and_processor_work_together_and_save(parts, tmp_path):
    model = LavitForConditionalGeneration.from_vision_text_pretrained(*parts, **CODES)
    spread_selector(model.visual_tokenizer)
    processor = build(*parts, config=model, visual_tokenizer=model)
    picture = Image.radial_gradient("L")
    inputs = processor(images=picture, text="<image>a red", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    prompt = processor(text="a red circle", generation_mode="image", return_tensors="pt")
    ids = model.generate(**prompt, generation_mode="image", max_new_tokens=5)
    (codes,) = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert codes.min() >= 0 and codes.max() < 24

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = ImageTextProcessor.from_pretrained(tmp_path)
    light = LavitForConditionalGeneration.from_pretrained(tmp_path)
    expected = model(**inputs).logits[:, -1]
    actual = light(**again(images=picture, text="<image>a red", return_tensors="pt")).logits[:, -1]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_directory_of_a_visual_tokenizer_may_have_the_image_processor(parts, config, tmp_path):
    LavitImageProcessorPil(image_mean=[0.3] * 3, size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    processor = build(tmp_path, parts[1], config=config)
    assert list(processor.image_processor.image_mean) == [0.3] * 3


def test_arguments_that_do_not_make_a_processor(parts, config, tmp_path):
    vision, text = parts
    with pytest.raises(ValueError, match="Pass `config=model.config`"):
        build(vision)
    with pytest.raises(ValueError, match="codebook_size, which it holds"):
        build(vision, text, config=config, codebook_size=24)
    with pytest.raises(TypeError, match="must be a LavitConfig"):
        build(vision, text, config="lavit")
    with pytest.raises(ValueError, match="image_processor"):
        build(None, text, config=config)
    with pytest.raises(ValueError, match="`tokenizer`"):
        build(vision, None, config=config)
    with pytest.raises(ValueError, match="Expected a text tokenizer"):
        build(vision, tokenizer=build(vision, text, config=config).tokenizer, config=config)
    small = LavitConfig.from_vision_text_configs(vision_config(), language_config(vocab_size=200), **CODES)
    with pytest.raises(ValueError, match="the language model embeds 200 only"):
        build(vision, text, config=small)


def test_models_that_are_loaded_already_take_what_can_still_be_done() -> None:
    model = combine(dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.visual_tokenizer.vision_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["text_revision", "vision_image_size"])
def test_models_that_are_loaded_already_take_nothing_else(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}. Load it with them"):
        combine(**{name: 56})
