"""Prompts and chats with any text in them: no text becomes a control id, and every text comes back as it was."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image

from fuzz.runner import CLEAR, attempt, blocks, check_all, describe, seeded_rng
from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

WORDS = [
    *("", "a", "the", "cat", "dog", "Question:", "Answer:", "what is it?", "red-blue,", "3.14", "%", "#"),
    *("\t", "\n", "\r\n", "\x00", "\x7f", "\u00e9", "e\u0301"),
]
CONTROL = [
    *("<img>", "</img>", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<|im_end|>"),
    *("<visual_0>", "<visual_7>", "<visual_63>", "<visual_64>"),
]
SCRIPTS = ["\u4f60\u597d", "\u0645\u0631\u062d", "\u05e9\u05dc\u05d5", "\u0928\u092e\u0938\u094d", "\ud55c"]
ODD = [
    *("\ufeff", "\u200b", "\u202e", "\u00ad", "\u3000", "\u00a0", "\u2028", "\uffff", "\ufffd", "\U0010ffff"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ue000", "\U000f0000", "\U000f0001"),
    *("{{ 1/0 }}", "{% for %}", "{#", "}}", "<", ">", "<<<", "</", "<image", "image>", "&lt;image&gt;", "\\u003c"),
]
SURROGATES = ["\ud800", "\udfff", "\ud83d"]
ROLES = ["user", "assistant", "system", "tool"]
NAMES_SURROGATE = r"surrogate|\\ud[89a-f]|U\+D[89A-F]"


def write_text(rng: random.Random, *, is_chat: bool = False, surrogates: bool = True) -> str:
    """Text of any length, of pieces that have gone wrong somewhere before. In chats `<image>` is text, too."""
    pools = [WORDS, WORDS, CONTROL, SCRIPTS, ODD, ["<image>"] if is_chat else CONTROL]
    if surrogates and rng.random() < 0.03:
        pools.append(SURROGATES)
    pieces = []
    for _ in range(rng.choice([0, 1, 2, 5, 20, 20, 100])):
        piece = rng.choice(rng.choice(pools))
        if rng.random() < 0.2:
            piece = chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        pieces += [piece, rng.choice(["", " ", "  "])]
    text = "".join(pieces)
    if rng.random() < 0.01:
        text = text[:100] * rng.randint(100, 1000)
    if rng.random() < 0.003:
        text += "".join(map(chr, range(0xF0000, 0xFFFFE)))  # all characters that could stand for another one
    return text if is_chat else text.replace("<image>", "")


def has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(character) < 0xE000 for character in text)


@pytest.fixture(scope="module")
def processors(tiny_checkpoint: Path) -> list[ImageTextProcessor]:
    """Without a visual tokenizer, and with one."""
    model = LavitForConditionalGeneration.from_pretrained(tiny_checkpoint)
    return [
        ImageTextProcessor.from_pretrained(tiny_checkpoint),
        ImageTextProcessor.from_pretrained(tiny_checkpoint, visual_tokenizer=model),
    ]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (20 + 9 * index, 30), color) for index, color in enumerate(["red", "green", "blue"])]


def control_ids(tokenizer: Any) -> set[int]:
    """Ids that no text may become."""
    first = tokenizer.boi_token_id
    return {
        *range(first, len(tokenizer)),
        tokenizer.image_token_id,
        tokenizer.unk_token_id,
        *tokenizer.all_special_ids,
    }


def text_parts(tokenizer: Any, ids: list[int]) -> list[list[int]]:
    """What stands before, between and after the images of a row; with generation_mode="image", also the last start."""
    parts: list[list[int]] = [[]]
    is_image = False
    for index in ids:
        if index in (tokenizer.boi_token_id, tokenizer.eoi_token_id):
            assert is_image == (index == tokenizer.eoi_token_id), f"starts and ends do not alternate: {ids}"
            is_image = not is_image
            if not is_image:
                parts.append([])
        elif not is_image:
            parts[-1].append(index)
        else:
            assert index in control_ids(tokenizer), f"text within an image: {ids}"
    return parts


def unpadded(inputs: Any) -> list[list[int]]:
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [[int(index) for index, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows]


def check_text(tokenizer: Any, text: str, ids: list[int]) -> None:
    """The ids of a text are text, and decode to it; sentencepiece's mark of a space is a space."""
    assert not control_ids(tokenizer) & set(ids), f"{text[:200]!r} became a control id: {ids[:200]}"
    assert tokenizer.decode(ids) == text.replace("\u2581", " "), f"{text[:200]!r} came back as another text"


# Prompts


def odd_prompt(rng: random.Random) -> Any:
    """Something that is no prompt, or too little of one."""
    odd = [None, 3, b"a", [None], ["a", 3], [["a"]], {}, {"text": "a"}, [], "", [""], ["a", ""], ("a", b"b"), object()]
    return rng.choice(odd)


def check_prompt(seed: int, processors: list[ImageTextProcessor], pictures: list[Image.Image]) -> None:
    rng = seeded_rng("prompt", seed)
    processor = rng.choice(processors)
    tokenizer = processor.tokenizer
    if rng.random() < 0.05:
        prompt = odd_prompt(rng)
        found = attempt(processor, text=prompt, names="text|prompt|images")
        assert isinstance(found, CLEAR), f"{prompt!r} is taken for a prompt"
        return
    segments = [
        [write_text(rng) for _ in range(1 + rng.choice([0, 0, 1, 2]))] for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    prompts = ["<image>".join(parts) for parts in segments]
    options: dict[str, Any] = {"visual_mode": rng.choice(["continuous", "discrete", None])}
    if rng.random() < 0.2:
        options["generation_mode"] = rng.choice(["text", "image", "interleaved"])
    if options.get("generation_mode") == "image":
        options["visual_mode"] = "discrete"
    images = [[rng.choice(pictures) for _ in parts[1:]] for parts in segments]
    wrong_count = rng.random() < 0.1
    if wrong_count:
        images[rng.randrange(len(images))].append(pictures[0])
    has_images = any(images)
    is_flat = rng.random() < 0.5
    given = [image for row in images for image in row] if is_flat else images
    found = attempt(processor, images=given if has_images else None, text=prompts, **options)
    if isinstance(found, CLEAR):
        check_refusal(found, prompts, wrong_count, options)
        return
    assert not wrong_count, "the number of images was not checked"
    rows = unpadded(found)
    for ids, parts in zip(rows, segments, strict=True):
        if options.get("generation_mode") == "image":
            assert ids.pop() == tokenizer.boi_token_id
        pieces = text_parts(tokenizer, ids)
        assert len(pieces) == len(parts), f"{len(pieces) - 1} images instead of {len(parts) - 1}"
        for text, piece in zip(parts, pieces, strict=True):
            check_text(tokenizer, text, piece)
    index = rng.randrange(len(prompts))
    alone = processor(images=images[index] or None, text=prompts[index], **options)
    assert unpadded(alone)[0] == unpadded(found)[index], "a prompt alone has other ids than in a batch"
    if rng.random() < 0.3:
        check_truncation(rng, processor, prompts[index], images[index], unpadded(alone)[0], options)


def check_refusal(error: Exception, prompts: list[str], wrong_count: bool, options: dict[str, Any]) -> None:
    """Prompts are refused for a reason, and told which."""
    message = str(error)
    if any(has_surrogate(prompt) for prompt in prompts) and re.search(NAMES_SURROGATE, message, re.IGNORECASE):
        return
    if wrong_count and "number of <image>" in message:
        return
    is_empty = any(not prompt for prompt in prompts) and options.get("generation_mode") != "image"
    assert is_empty and "empty" in message, f"refused: {describe(error)}"


def check_truncation(
    rng: random.Random,
    processor: ImageTextProcessor,
    prompt: str,
    images: list[Image.Image],
    whole: list[int],
    options: dict[str, Any],
) -> None:
    """Text is cut, images are not."""
    length = rng.randint(1, len(whole) + 1)
    options = {**options, "truncation": True, "max_length": length}
    cut = attempt(processor, images=images or None, text=prompt, names="max_length", **options)
    if isinstance(cut, CLEAR):
        assert images and length < len(whole), f"refused: {describe(cut)}"
        return
    ids = unpadded(cut)[0]
    is_drawing = options.get("generation_mode") == "image"
    kept = max(length - is_drawing, 0)
    text = whole[:-1] if is_drawing else whole
    expected = text[:kept] if processor.tokenizer.truncation_side == "right" else text[len(text) - kept :]
    if len(text) <= kept:
        expected = text
    assert ids == expected + whole[-1:] * is_drawing, f"truncation to {length} gave {len(ids)} other ids"


@blocks("prompts")
def test_prompts(seeds: list[int], processors, pictures) -> None:
    check_all(seeds, lambda seed: check_prompt(seed, processors, pictures), seconds=120)


# Chats


def write_chat(rng: random.Random, pictures: list[Image.Image]) -> tuple[list[dict], list[Image.Image]]:
    """Messages, and their images in order."""
    messages, images = [], []
    for turn in range(rng.choice([1, 1, 2, 3, 6])):
        role = ROLES[turn % 2] if rng.random() < 0.9 else rng.choice(ROLES)
        parts: list[dict[str, Any]] = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            if role == "user" and rng.random() < 0.4:
                images.append(rng.choice(pictures))
                parts.append({"type": "image", "image": images[-1]})
            else:
                parts.append({"type": "text", "text": write_text(rng, is_chat=True)})
        is_plain = len(parts) == 1 and parts[0]["type"] == "text" and rng.random() < 0.5
        messages.append({"role": role, "content": parts[0]["text"] if is_plain else parts})
    return messages, images


def break_chat(rng: random.Random, messages: list[dict]) -> Any:
    """A chat that is none."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([None, 3, "a chat", [], [[]], {}, [None], ["a"], b"a"])
    message = rng.choice(messages)
    if kind == 1:
        del message[rng.choice(list(message))]
    elif kind == 2:
        message["content"] = rng.choice([None, 3, {}, [None], ["a"], [3], b"a"])
    elif kind == 3:
        message["content"] = [{"type": rng.choice(["video", "audio", "", None, 3, "IMAGE"]), "text": "a"}]
    elif kind == 4:
        message["content"] = [rng.choice([{}, {"type": "text"}, {"text": "a"}, {"type": "text", "text": None}])]
    else:
        broken = rng.choice([{"type": "image"}, {"type": "image", "image": None}, {"type": "image", "image": 3}])
        message["content"] = [rng.choice([broken, {"type": "image", "path": "nowhere.png"}])]
    return messages


def shown_text(messages: list[dict]) -> list[str]:
    parts = [message["content"] for message in messages]
    texts = [
        [content] if isinstance(content, str) else [part.get("text", "") for part in content] for content in parts
    ]
    return [text for row in texts for text in row]


def check_chat(seed: int, processors: list[ImageTextProcessor], pictures: list[Image.Image]) -> None:
    rng = seeded_rng("chat", seed)
    processor = rng.choice(processors)
    messages, images = write_chat(rng, pictures)
    is_broken = rng.random() < 0.15
    chat = break_chat(rng, messages) if is_broken else messages
    options: dict[str, Any] = {"add_generation_prompt": rng.random() < 0.5, "tokenize": True, "return_dict": True}
    if rng.random() < 0.2:
        options["sanitize_control_tokens"] = True
    if rng.random() < 0.1:
        options["return_assistant_tokens_mask"] = True
    shown = repr(chat)[:300]
    try:
        found = attempt(processor.apply_chat_template, chat, **options)
    except TemplateError as error:  # how templates refuse, in all of transformers
        if is_broken and len(str(error)) > 15:
            return
        raise AssertionError(f"{shown}: {describe(error)}") from error
    except Exception as error:
        raise AssertionError(f"{shown}: {describe(error)}") from error
    texts = [] if is_broken else shown_text(messages)
    if isinstance(found, CLEAR):
        message = str(found)
        has_reason = any(map(has_surrogate, texts)) and re.search(NAMES_SURROGATE, message, re.IGNORECASE)
        has_reason = has_reason or (not images and not "".join(texts).strip() and "empty" in message)
        # Who writes all characters that could stand for "<" is told so.
        has_reason = has_reason or ("private" in message and any(len(text) > 65000 for text in texts))
        assert is_broken or has_reason, f"{shown}: refused: {describe(found)}"
        return
    (ids,) = unpadded(found)
    pieces = text_parts(processor.tokenizer, ids)
    control = control_ids(processor.tokenizer)
    assert not control & {index for piece in pieces for index in piece}, f"{shown}: text became a control id"
    if is_broken:
        return
    assert len(pieces) == len(images) + 1, f"{shown}: {len(pieces) - 1} images instead of {len(images)}"
    written = "".join(processor.tokenizer.decode(piece) for piece in pieces)
    position = 0
    for text in texts:  # all of it, in order, and nothing changed
        text = text.replace("\u2581", " ")
        position = written.find(text, position)
        assert position >= 0, f"{shown}: lost {text[:80]!r}"
        position += len(text)
    if options.get("return_assistant_tokens_mask"):
        (mask,) = torch.as_tensor(found["assistant_masks"]).tolist()
        assert len(mask) == len(found["input_ids"][0]), f"{shown}: a mask of another length"


@blocks("chats")
def test_chats(seeds: list[int], processors, pictures) -> None:
    check_all(seeds, lambda seed: check_chat(seed, processors, pictures), seconds=120)
