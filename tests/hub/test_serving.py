"""What inference servers ask of a model that they run from its own code, as far as it can be seen without one.

See https://docs.vllm.ai/en/latest/models/supported_models (custom models), and transformers' guide on inference
backends.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitModel

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "chelsea.jpg"


@pytest.fixture(scope="module")
def tiny_model() -> LavitForConditionalGeneration:
    return LavitForConditionalGeneration.from_pretrained(PICTURE.parents[2] / "checkpoints" / "lavit-tiny-random")


@pytest.fixture
def processor(tiny_checkpoint: Path) -> ImageTextProcessor:
    return ImageTextProcessor.from_pretrained(tiny_checkpoint)


def test_base_model_can_be_found_and_plugged_into(checkpoint: Path, tiny_model) -> None:
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_lavit.LavitModel"
    assert LavitModel.is_backend_compatible() and LavitModel._supports_attention_backend
    assert tiny_model.model.language_model is tiny_model.get_decoder()
    assert "model.language_model.layers.*.self_attn.q_proj" in tiny_model.tp_plan


def test_attention_is_replaceable(tiny_model, processor) -> None:
    """Servers register an attention of their own, and hand its arguments on from the base model to every layer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append((type(module).__name__, kwargs.get("server_argument")))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("of_a_server", attention)
    inputs = processor(text="a cat", return_tensors="pt")
    before = tiny_model.config._attn_implementation
    with torch.no_grad():
        expected = tiny_model(**inputs).logits
        tiny_model.set_attn_implementation("of_a_server")
        found = tiny_model(**inputs, server_argument=7).logits
        tiny_model.set_attn_implementation(before)
    assert seen == [("LlamaAttention", 7)] * tiny_model.config.text_config.num_hidden_layers
    torch.testing.assert_close(found, expected)


def test_processor_says_where_images_go(processor) -> None:
    options = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True}
    inputs = processor(images=[PICTURE] * 2, text="a <image> and <image>", **options)
    (ids,), (types,), (replaced,) = (inputs[k] for k in ("input_ids", "mm_token_type_ids", "text_replacement_offsets"))
    assert processor.image_token_ids == [processor.image_token_id]
    assert (np.array(types) == (np.array(ids) == processor.image_token_id)).all()
    assert processor._get_num_multimodal_tokens([(480, 640)] * 2)["num_image_tokens"] == [16, 16]
    assert sum(types) == 32 and len(replaced) == 2
    assert processor.replace_image_token({}, 0) == replaced[0]["replacement"]


def test_features_are_one_tensor_per_image(tiny_model, processor) -> None:
    pictures = [PICTURE, np.zeros((64, 64, 3), dtype=np.uint8)]
    light = processor(images=pictures, text="<image><image>", return_tensors="pt")
    features = tiny_model.get_image_features(pixel_values=light["pixel_values"]).pooler_output
    kept = tiny_model.visual_tokenizer.embed(light["pixel_values"]).num_tokens
    assert [len(tokens) for tokens in features] == kept.tolist()


def test_what_keeps_vllm_from_continuous_images(tiny_model, processor) -> None:
    """The documentation says so; once one of these changes, it has to be looked at again."""
    light = processor(images=PICTURE, text="<image>", return_text_replacement_offsets=True, return_tensors="pt")
    placeholders = (light["input_ids"] == processor.image_token_id).sum().item()
    (features,) = tiny_model.get_image_features(pixel_values=light["pixel_values"]).pooler_output
    assert len(features) < placeholders == 16
    (replaced,) = light["text_replacement_offsets"][0]
    assert processor.image_token_id not in processor.tokenizer(replaced["replacement"])["input_ids"]
