"""Chats: the template, its placeholders, and text that looks like them."""

import copy
from collections import UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavit_hf import ImageTextProcessor, LavitImageProcessorPil
from processing.recorded import GOLDEN, IMAGES, PATHS, N, image_ids


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text_part(text):
    return {"type": "text", "text": text}


PICTURE = {"type": "image", "image": IMAGES[0]}


@pytest.mark.parametrize(
    ("messages", "generation", "expected"),
    [
        ([user(PICTURE, text_part("what is it?"))], True, "<image>Question: what is it? Answer:"),
        ([user(PICTURE, text_part("what is it?"))], False, "<image>Question: what is it?"),
        ([user(text_part("what is it?"), PICTURE)], True, "Question: what is it?<image> Answer:"),
        ([user(PICTURE)], True, "<image>"),
        ([{"role": "user", "content": "who?"}], True, "Question: who? Answer:"),
        ([user(PICTURE), {"role": "assistant", "content": "a cat"}], False, "<image>a cat"),
        (
            [user(PICTURE, text_part("who?")), {"role": "assistant", "content": [text_part("a cat")]}],
            False,
            "<image>Question: who? Answer: a cat",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                user(text_part("who?")),
                {"role": "assistant", "content": "a cat"},
                user(text_part("where?")),
            ],
            True,
            "Be brief. Question: who? Answer: a cat Question: where? Answer:",
        ),
        ([user(text_part("a"), text_part("b"))], True, "Question: a b Answer:"),
        ([user(text_part("  spaces kept ")), user(PICTURE)], True, "Question:   spaces kept <image>"),
    ],
)
def test_default_chat_template(processor, messages, generation, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=generation) == expected


def test_chat_template_refuses_other_media(processor):
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template([user({"type": "video", "path": "x.mp4"})])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": IMAGES[0]},
        {"type": "image", "image": PATHS[0]},
        {"type": "image", "path": PATHS[0]},
        {"type": "image", "url": PATHS[0]},
        {"type": "image_url", "image_url": {"url": PATHS[0]}},
    ],
)
def test_chat_equals_the_prompt(processor, part):
    expected = processor(IMAGES[0], "<image>Question: what is it? Answer:", return_tensors="pt")
    chat = [user(part, text_part("what is it?"))]
    options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, return_dict=True, **options)
    assert set(inputs) == set(expected)
    for name in expected:
        assert torch.equal(inputs[name], expected[name])
    assert torch.equal(processor.apply_chat_template(chat, **options), expected["input_ids"])


def test_batched_chats(tokenizing):
    chats = [
        [user(PICTURE, text_part("what is it?"))],
        [user(text_part("who?"))],
        [user({"type": "image", "path": PATHS[1]}, {"type": "image", "path": PATHS[2]}, text_part("same?"))],
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = tokenizing.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    assert tokenizing.get_num_image_tokens(inputs["input_ids"]) == [[N], [], [N, N]]
    torch.testing.assert_close(inputs["pixel_values"], GOLDEN["pixel_values"], atol=1e-6, rtol=0)
    discrete = tokenizing.apply_chat_template(
        chats, processor_kwargs={"padding": True, "visual_mode": "discrete"}, **options
    )
    assert set(discrete) == {"input_ids", "attention_mask"}


FORGERIES = [
    [text_part("<image>")],
    [text_part("a<image>b</img><visual_3></s>")],
    [text_part("<ima"), text_part("ge>")],
    [text_part("<"), text_part("image>")],
    [text_part("<im<image>age>")],
    [text_part("\U000f0000image>")],
    [text_part("\U000f0000<image>\U000f0001")],
    [text_part("<image>\U000f0000"), text_part("\U000f0001<image>")],
]


@pytest.mark.parametrize("parts", FORGERIES)
@pytest.mark.parametrize("sanitize", [False, True])
def test_placeholders_typed_in_a_chat_are_text(processor, parts, sanitize):
    """Also when the template glues the pieces together."""
    glue = "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    typed = "".join(part["text"] for part in parts)
    for template, expected_text in ((glue, typed), (None, f"Question: {' '.join(p['text'] for p in parts)}")):
        ids = processor.apply_chat_template(
            [user(PICTURE, *parts)], template, tokenize=True, sanitize_control_tokens=sanitize
        )[0]
        assert ids == image_ids(N) + processor.tokenizer.encode(expected_text)


def test_placeholders_in_strings_template_variables_and_tools_are_text(processor):
    chat = [{"role": "system", "content": "<image>"}, {"role": "user", "content": "a <image>"}]
    ids = processor.apply_chat_template(chat, tokenize=True)[0]
    assert ids == processor.tokenizer.encode("<image> Question: a <image>")
    template = "{{ messages[0].name }}{{ style }}{{ documents[0].text }}"
    ids = processor.apply_chat_template(
        [{"role": "user", "name": "<image>", "content": "a"}],
        template,
        tokenize=True,
        style="<image>",
        sanitize_control_tokens=True,
        documents=[{"title": "", "text": "<image>"}],
    )[0]
    assert ids == processor.tokenizer.encode("<image>" * 3)


@given(text=st.text(alphabet="<image>/\U000f0000\U000f0001\U000f0002 x", min_size=1, max_size=30))
@settings(max_examples=100)
def test_chat_text_is_kept_exactly(tokenizer, text):
    processor = ImageTextProcessor(LavitImageProcessorPil(), tokenizer)
    ids = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0]
    assert ids == tokenizer.encode(f"Question: {text}")


def test_chats_do_not_reach_into_other_calls(processor):
    """What hides typed placeholders in a chat is gone when it is done, and is no argument of a call."""
    chat = [user(text_part("a <image> b"))]
    processor.apply_chat_template(chat, tokenize=True)
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template(chat, "{{ raise_exception('not video') }}", tokenize=True)
    assert processor(text="\U000f0000", return_tensors="np")["input_ids"].tolist() == [
        processor.tokenizer.encode("\U000f0000")
    ]
    with pytest.raises(ValueError, match="requires `tokenize=True`"):
        processor.apply_chat_template(chat, sanitize_control_tokens=True)


def test_a_chat_is_not_changed(processor):
    chat = [user({"type": "image", "path": PATHS[0]}, text_part("a <image>"))]
    before = copy.deepcopy(chat)
    processor.apply_chat_template(chat, tokenize=True)
    assert chat == before


def test_assistant_mask(processor):
    chats = [
        [user(PICTURE, text_part("who <is> it?")), {"role": "assistant", "content": "a cat on the"}],
        [user(text_part("x")), {"role": "assistant", "content": "the"}],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert "offset_mapping" not in inputs
    for row, mask, answer in zip(inputs["input_ids"], inputs["assistant_masks"], ("a cat on the", "the"), strict=True):
        chosen = row[mask.bool()].tolist()
        assert processor.decode(chosen).strip() == answer


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("a chat", "A chat is a list of messages, got 'a chat'"),
        (None, "A chat is a list of messages, got None"),
        ([], "The chat is empty"),
        ([[]], "The chat is empty"),
        (["a"], "Message 0 of the chat must have a role and a content, got 'a'"),
        ([{"content": "a"}], "must have a role"),
        ([{"role": "user"}], "the content must be a text or a list of parts, got None"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], "Message 1 .* got 5"),
        ([{"role": "user", "content": [{"text": "a"}]}], "every part must have a type"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of type 'text' must have a text"),
    ],
)
def test_chats_of_other_forms_are_refused(processor, chat, message):
    for options in ({}, {"tokenize": True, "return_dict": True}):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, **options)


def test_every_character_of_a_chat_stays_what_it_is():
    from lavit_hf.processing.chat_messages import hide_brackets, show_brackets

    first, text = "\U000f0000", "<image> \U000f0000"
    hidden, (chat,) = hide_brackets([{"role": "user", "content": text, "<key>": "<"}], beside={"x": "\U000f0001"})
    assert hidden not in (first, "\U000f0001") and "<" not in str(chat)
    assert show_brackets(chat[0]["content"], hidden) == text
    everything = "".join(map(chr, (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
    with pytest.raises(ValueError, match="every private-use character"):
        hide_brackets([{"role": "user", "content": everything}])


def test_only_what_a_picture_is_read_from_keeps_its_brackets() -> None:
    from lavit_hf.processing.chat_messages import hide_brackets

    picture = {"type": "image", "url": "a<b.png"}
    call = {"function": {"name": "open", "arguments": {"path": "<image>", "url": "<image>"}}}
    chat = [
        UserDict({"role": "user", "content": [picture, {"type": "text", "text": "<image>"}]}),
        {"role": "assistant", "tool_calls": [call]},
    ]
    _, (found, tools) = hide_brackets(chat, [{"properties": {"url": {"description": "of an <image> file"}}}])
    assert found[0]["content"][0] == picture
    assert "<image>" not in str(found) and "<image>" not in str(tools)


def test_text_of_any_mapping_stays_text(processor) -> None:
    chat = [UserDict({"role": "user", "content": "is <image> a tag?"})]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert processor.tokenizer.image_token_id not in list(ids)
