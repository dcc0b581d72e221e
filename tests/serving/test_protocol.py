"""Forms of requests, without a server."""

import json

import pytest

from lavit_hf.serving.protocol import ApiError, ChatRequest, Message, parse

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}


def read(**options) -> ChatRequest:
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}], **options}
    return parse(ChatRequest, json.dumps(body).encode())


def read_message(**values) -> Message:
    (message,) = read(messages=[values]).messages
    return message


@pytest.mark.parametrize(
    ("message", "types"),
    [
        ({"content": None, "images": [PICTURE], "refusal": None}, ["image_url"]),
        ({"content": "", "images": [{**PICTURE, "index": 0}]}, ["image_url"]),
        ({"content": "two", "images": [PICTURE, PICTURE]}, ["text", "image_url", "image_url"]),
        ({"content": "none", "images": None}, ["text"]),
        ({"content": "", "images": []}, ["text"]),
    ],
)
def test_pictures_of_answers_are_parts(message: dict, types: list[str]) -> None:
    assert [part.type for part in read_message(role="assistant", **message).parts] == types


def test_pictures_of_others_are_parts_of_their_content_alone() -> None:
    message = read_message(role="user", content=[PICTURE], images="any")
    assert [part.type for part in message.parts] == ["image_url"]


@pytest.mark.parametrize(
    "body", ['{"model": "m", "messages": [' + "0," * 200_000 + "0]}", "{" + '"a": 1,' * 200_000 + "}"]
)
def test_a_request_of_many_parts_is_refused_before_it_is_read(body: str) -> None:
    """Of each, an error would be made, and they took a gigabyte."""
    with pytest.raises(ApiError, match="more than 100,000 parts") as caught:
        parse(ChatRequest, body.encode())
    assert caught.value.status == 413
    text = json.dumps({"model": "m", "messages": [{"role": "user", "content": "so, so, " * 40_000}]})
    assert parse(ChatRequest, text.encode()).messages


def test_nulls_say_nothing() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,", "detail": None}}
    (part,) = read_message(role="user", content=[picture], name=None).parts
    assert part.image_url.detail == "auto"
    form = read(stop=None, stream_options={"include_usage": None})
    assert form.stop_words == [] and not form.stream_options.include_usage
    assert "stop" not in form.model_fields_set
