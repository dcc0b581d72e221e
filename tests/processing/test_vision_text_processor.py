"""The processor of a new LaVIT, out of a vision encoder's image processor and a language model's tokenizer."""

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from lavit_hf import ImageTextProcessor, LavitConfig, LavitForConditionalGeneration, LavitImageProcessorPil
from tiny_models import spread_selector
from tiny_parts import CODES, TEXT_VOCAB, build_text_tokenizer, save_text, save_vision, text_config, vision_config

build = ImageTextProcessor.from_vision_text_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return save_vision(root / "vision"), save_text(root / "text")


@pytest.fixture(scope="module")
def config() -> LavitConfig:
    return LavitConfig.from_vision_text_configs(vision_config(), text_config(), **CODES)


def test_ids_follow_the_embedding_table_not_the_tokenizer(folders, config):
    text_tokenizer = AutoTokenizer.from_pretrained(folders[1])
    assert len(text_tokenizer) < TEXT_VOCAB
    tokenizer = build(*folders, config=config).tokenizer
    ids = (tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.visual_token_offset, tokenizer.image_token_id)
    assert ids == (config.boi_token_id, config.eoi_token_id, config.visual_token_offset, config.image_token_id)
    assert tokenizer.codebook_size == CODES["codebook_size"]
    text = "a red circle</s>"
    assert tokenizer("a red circle").input_ids == text_tokenizer("a red circle", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "</s>", 128)


def test_image_processor_has_the_encoders_statistics_and_lavits_shape(folders, config):
    processor = build(*folders, config=config)
    images = processor.image_processor
    assert isinstance(images, LavitImageProcessorPil)
    assert (list(images.image_mean), list(images.image_std), images.resample) == ([0.5] * 3, [0.25] * 3, 2)
    assert dict(images.size) == {"height": 16, "width": 16} and processor.image_seq_length == 16
    pixels = images(Image.new("RGB", (40, 10), "white"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, 16, 16), 2.0))


def test_without_a_configuration_it_is_made_of_the_models(folders, config):
    processor = build(*folders, codebook_size=24, visual_mode="discrete")
    assert processor.tokenizer.image_token_id == config.image_token_id and processor.visual_mode == "discrete"


def test_objects_instead_of_directories(folders, config):
    expected = build(*folders, config=config)
    processor = build(
        config=config, image_processor=LavitImageProcessorPil(image_mean=[0.1] * 3), tokenizer=build_text_tokenizer()
    )
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert list(processor.image_processor.image_mean) == [0.1] * 3
    assert processor.image_processor.size["height"] == 16


def test_model_and_processor_work_together_and_save(folders, tmp_path):
    model = LavitForConditionalGeneration.from_vision_text_pretrained(*folders, **CODES)
    spread_selector(model.visual_tokenizer)
    processor = build(*folders, config=model, visual_tokenizer=model)
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


def test_the_directory_of_a_visual_tokenizer_may_have_the_image_processor(folders, config, tmp_path):
    LavitImageProcessorPil(image_mean=[0.3] * 3, size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    processor = build(tmp_path, folders[1], config=config)
    assert list(processor.image_processor.image_mean) == [0.3] * 3


def test_arguments_that_do_not_make_a_processor(folders, config, tmp_path):
    vision, text = folders
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
    small = LavitConfig.from_vision_text_configs(vision_config(), text_config(vocab_size=200), **CODES)
    with pytest.raises(ValueError, match="the language model embeds 200 only"):
        build(vision, text, config=small)
