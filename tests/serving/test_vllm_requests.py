"""What requests to vLLM say of pictures; tests/engines runs vLLM itself."""

from pathlib import Path

import pytest
from PIL import Image

from lavit_hf import ImageTextProcessor, default_checkpoint
from lavit_hf.serving.vllm.requests import PictureOptions, place_pictures, read_options


def read(request: dict, server: dict | None = None, num_images: int = 2) -> PictureOptions:
    return read_options(request, server or {}, num_images, num_patches=64, visual_mode="continuous")


def test_pictures_become_a_fixed_number_of_tokens() -> None:
    assert read({}) == PictureOptions(21, None, "continuous")
    assert read({"num_image_tokens": 8}).num_tokens == 8
    assert read({"keep_rate": 0.5}).num_tokens == 32
    assert read({"max_total_image_tokens": 25}, num_images=3).num_tokens == 8
    assert read({"max_total_image_tokens": 1000}).num_tokens == 64
    assert read({"visual_mode": "discrete"}) == PictureOptions(21, None, "discrete")


def test_requests_override_the_server() -> None:
    server = {"selection": "argmax", "visual_mode": "discrete"}
    assert read({}, server) == PictureOptions(None, "argmax", "discrete")
    assert read({"num_image_tokens": 8}, server) == PictureOptions(8, None, "discrete")
    assert read({"selection": "expected", "visual_mode": "continuous"}, {"keep_rate": 0.5}) == PictureOptions(
        None, "expected", "continuous"
    )
    assert read({}, server).to_dict() == {"selection": "argmax", "visual_mode": "discrete"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_tokens": 8}, "no 'num_tokens'.*num_image_tokens, keep_rate"),
        ({"num_image_tokens": 8, "keep_rate": 0.5}, "one of num_image_tokens and keep_rate"),
        ({"num_image_tokens": [8, 4]}, "num_image_tokens is one number"),
        ({"num_image_tokens": True}, "one number"),
        ({"keep_rate": float("nan")}, "one number"),
        ({"num_image_tokens": 65}, "1 to 64 tokens"),
        ({"num_image_tokens": 0}, "1 to 64 tokens"),
        ({"num_image_tokens": 8.5}, "integer"),
        ({"max_total_image_tokens": 1}, "2 pictures need a token each"),
        ({"keep_rate": 2}, "keep_rate must be"),
        ({"selection": "sample"}, "argmax, expected; got 'sample'"),
        ({"visual_mode": "both"}, "'both'"),
    ],
)
def test_refusals(request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(request_)


TINY = Path(__file__).parents[2] / "checkpoints" / "lavit-tiny-random"


@pytest.mark.parametrize("path", [TINY, default_checkpoint()], ids=["sentencepiece", "bytes"])
def test_prompts_are_tokenized_as_by_the_processor(path: Path | str) -> None:
    """vLLM tokenizes the rendered chat as one text."""
    processor = ImageTextProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer
    placeholder = tokenizer.image_token_id
    for text in ("<image>Question: what is it? Answer:", "a<image> b<image>", "<image><image>", "<image>"):
        count = text.count("<image>")
        pictures = [Image.new("RGB", (32, 32))] * count
        (row,) = processor(images=pictures, text=text, num_image_tokens=1)["input_ids"]
        expected = [index for index in row if index not in (tokenizer.boi_token_id, tokenizer.eoi_token_id)]
        assert expected.count(placeholder) == count
        assert place_pictures(tokenizer.encode(text), tokenizer, "<image>", count) == expected


def test_ids_of_pictures_stay() -> None:
    tokenizer = ImageTextProcessor.from_pretrained(TINY).tokenizer
    codes = [tokenizer.boi_token_id, tokenizer.visual_token_offset + 7, tokenizer.eoi_token_id]
    text = tokenizer.encode("a cat")
    assert place_pictures([*codes, *text], tokenizer, "<image>", 0) == [*codes, *text]
    mixed = [*codes, *tokenizer.encode("a<image>b"), tokenizer.image_token_id]
    placed = place_pictures(mixed, tokenizer, "<image>", 2)
    assert placed[:3] == codes and placed.count(tokenizer.image_token_id) == 2


def test_text_beside_pictures_does_not_spell_one() -> None:
    tokenizer = ImageTextProcessor.from_pretrained(TINY).tokenizer
    ids = tokenizer.encode("<image>Question: what is <image>? Answer:")
    with pytest.raises(ValueError, match="holds 2 <image> for 1 pictures"):
        place_pictures(ids, tokenizer, "<image>", 1)
    with pytest.raises(ValueError, match="holds 0 <image> for 1 pictures"):
        place_pictures(tokenizer.encode("a cat"), tokenizer, "<image>", 1)
