"""Requests that are refused: how, and that the server goes on."""

import asyncio
import gc
import http.client
import json
import socket
import threading
from types import SimpleNamespace

import openai
import pytest
from PIL import Image

from lavit_hf.serving import Engine, ServingLimits
from lavit_hf.serving import app as serving_app
from lavit_hf.serving.app import Gate
from lavit_hf.serving.jobs import Job, Prompt

from .conftest import NAME, SECONDS, data_url, picture_message, wait_until

HELLO = {"role": "user", "content": "hello"}
CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"


def send(server, body, path=CHAT, method="POST", **headers) -> tuple[int, dict, dict]:
    """Status, headers and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    text = body if isinstance(body, (bytes, str)) else json.dumps(body)
    connection.request(method, path, text, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), json.loads(content)


def chat(**options) -> dict:
    return {"model": NAME, "messages": [HELLO], "max_tokens": 4, **options}


def parts(*contents) -> list:
    return [{"role": "user", "content": list(contents)}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        (b"\xff\xfe{}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"temperature": NaN}', "NaN"),
        ('{"temperature": -Infinity}', "Infinity"),
        ({}, "Field required"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=1e999), "not JSON"),
        (chat(temperature=-1), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(temperature=1e-30), "must be 0, which is greedy, or from 0.01 on"),
        (chat(top_p=0), "top_p"),
        (chat(n=0), "n: "),
        (chat(n=1000), "n is 1000"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=10**6), "max_tokens is 1000000"),
        (chat(max_tokens=500), "has room for 512"),
        (chat(seed=-1), "seed"),
        (chat(seed=2**64), "seed"),
        (chat(seed=1.5), "seed"),
        (chat(stop=["a", "b", "c", "d", "e"]), "stop takes at most 4"),
        (chat(stop=[""]), "stop.0: String should have at least 1 character"),
        (chat(stop=""), "stop: String should have at least 1 character"),
        (chat(messages=[]), "messages"),
        (chat(messages="hello"), "messages"),
        (chat(messages=[{"role": "king", "content": "x"}]), "messages.0.role: "),
        (chat(messages=[{"role": "user"}]), "messages.0.content"),
        (chat(messages=[{"role": "user", "content": None}]), "messages.0.content: Field required"),
        (chat(messages=[{"role": "assistant", "content": None}]), "messages.0.content: Field required"),
        (chat(messages=[{"role": "assistant", "images": [{"type": "image_url"}]}]), "messages.0.images.0.image_url: "),
        (chat(messages=parts({"type": "video"})), "messages.0.content"),
        (chat(messages=parts({"type": "image_url", "image_url": {"url": 3}})), "image_url.url: "),
        (chat(messages=parts({"type": "image_url", "image_url": {"url": "data:,"}})), "data URL"),
        (chat(messages=parts({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})), "not fetched"),
        (chat(messages=parts({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}})), "not fetched"),
        (chat(messages=[HELLO] * 200), "has room for 512"),
        (chat(num_image_tokens=3, keep_rate=0.5), "Give one of"),
        (chat(num_image_tokens=[3.5]), "num_image_tokens.0: "),
        (chat(num_image_tokens="3"), "num_image_tokens"),
        (chat(modalities=["audio"]), "modalities"),
        (chat(modalities=["text", "image"]), "text or pictures"),
        (chat(modalities=[]), "text or pictures"),
        (chat(modalities=["image"], messages=[HELLO] * 200), "has room for 512"),
        (chat(tools=[]), "Unknown option: 'tools'"),
        (chat(logprobs=True), "logprobs"),
        (chat(frequency_penalty=1), "frequency_penalty"),
        (chat(num_beams=4, stream=True), "num_beams"),
        (chat(num_beams=1000), "num_beams"),
        (chat(min_tokens=9), "min_tokens is 9"),
        (chat(modalities=["image"], size="0x0"), "positive multiple"),
        (chat(modalities=["image"], n=9), "n is 9"),
    ],
)
def test_bad_chats(server, body, message: str) -> None:
    if isinstance(body, dict) and body.get("temperature") == 1e999:
        body = json.dumps(body)  # as Python writes it
    status, headers, answer = send(server, body)
    assert status == 400 and headers["content-type"] == "application/json"
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("modality", ["text", "image"])
def test_options_of_other_answers(server, modality: str) -> None:
    """What would be ignored is refused, even if it is as by default."""
    of_text = {"min_tokens": 1, "stop": ["a"], "num_beams": 1, "length_penalty": 0.5}
    of_pictures = {
        "size": "auto",
        "negative_prompt": "a dog",
        "guidance_scale": 2.5,
        "decoder_guidance_scale": 2.5,
        "num_inference_steps": 2,
        "min_drawn_tokens": 1,
        "max_drawn_tokens": 2,
        "image_end_bias": 0.5,
        "output_format": "png",
    }
    for name, value in (of_pictures if modality == "text" else of_text).items():
        status, _, answer = send(server, chat(modalities=[modality], **{name: value}))
        assert status == 400 and answer["error"]["code"] == "unsupported_parameter"
        assert answer["error"]["param"] == name and answer["error"]["message"].startswith(f"{name} is an option of")
    # Clients send null for what is not given, and a limit of text with every request.
    steps = {} if modality == "text" else {"num_inference_steps": 1}
    given = {"size": None, "stop": None, "max_completion_tokens": 4, **steps}
    assert send(server, chat(modalities=[modality], **given))[0] == 200


def test_a_length_penalty_needs_a_search(server) -> None:
    status, _, answer = send(server, chat(length_penalty=0))
    assert status == 400 and answer["error"]["code"] == "unsupported_parameter"
    assert answer["error"]["param"] == "length_penalty" and "num_beams" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": "x" * 600}, "has room for 512"),
        ({"negative_prompt": "x" * 600}, "has room for 512"),
        ({"size": "1024"}, "size"),
        ({"size": "7x9"}, "positive multiple of"),
        ({"size": "99992x99992"}, "at most 2097152"),
        ({"n": 50}, "n is 50"),
        ({"response_format": "url"}, "response_format"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"num_inference_steps": 500}, "at most 100"),
        ({"max_drawn_tokens": 99}, "at most"),
        ({"min_drawn_tokens": 9, "max_drawn_tokens": 3}, "in order"),
        ({"partial_images": 2}, "needs stream"),
        ({"partial_images": 9, "stream": True}, "partial_images"),
        ({"stream": True, "n": 2}, "one picture"),
        ({"background": "transparent"}, "background"),
    ],
)
def test_bad_drawings(server, options: dict, message: str) -> None:
    status, _, answer = send(server, {"prompt": "a cat", **options}, IMAGES)
    assert status == 400 and message in answer["error"]["message"]


def test_typed_errors_reach_the_client(client) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=NAME, messages=[HELLO], temperature=7)
    assert error.value.param == "temperature" and error.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.chat.completions.create(model="gpt-9", messages=[HELLO])
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="gpt-9", prompt="a cat")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="a")


def test_other_methods_and_types(server) -> None:
    assert send(server, "", method="GET")[0] == 405
    assert send(server, "", path="/v2", method="GET")[0] == 404
    status, _, answer = send(server, json.dumps(chat()), **{"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in answer["error"]["message"]


def test_large_requests(serve, images) -> None:
    server = serve(
        limits={"max_request_bytes": 30_000, "max_image_bytes": 2000, "max_image_pixels": 5000, "max_images": 2}
    )
    status, _, answer = send(server, chat(messages=[{"role": "user", "content": "x" * 40_000}]))
    assert status == 413 and "30,000 bytes" in answer["error"]["message"]
    # Without its length, too.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    body = iter([b'{"model": "', *[b"x" * 1000] * 50, b'"}'])
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    small, large = Image.new("RGB", (50, 50)), Image.new("RGB", (100, 100))
    assert send(server, chat(messages=[picture_message(data_url(small))]))[0] == 200
    for messages, message in [
        ([picture_message(data_url(large))], "100 x 100 pixels"),
        ([picture_message("data:image/png;base64," + "A" * 4000)], "larger than 2,000 bytes"),
        ([picture_message(*[data_url(small)] * 3)], "has 3 pictures"),
        ([{"role": "assistant", "images": picture_message(*[data_url(small)] * 3)["content"]}], "has 3 pictures"),
    ]:
        status, _, answer = send(server, chat(messages=messages))
        assert status == 400 and message in answer["error"]["message"]


def test_long_texts_are_refused_before_they_are_tokenized(serve, backend, monkeypatch) -> None:
    monkeypatch.setattr(type(backend), "prepare", lambda *args, **options: pytest.fail("it was tokenized"))
    server = serve()
    for messages in ([{"role": "user", "content": "x" * 10**6}], [{"role": "user", "content": ""}] * 2 * 10**4):
        status, _, answer = send(server, chat(messages=messages))
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_keys(serve) -> None:
    server = serve(api_key=" secret\n")  # as files and variables have it
    assert send(server, "", "/health", "GET")[0] == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/v2", "GET")):
            status, answered, answer = send(server, chat(), path, method, **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert answered["www-authenticate"] == "Bearer"
    assert send(server, chat(), Authorization="Bearer secret")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[::1"])
def test_names_that_lead_here_are_refused_without_a_key(serve, host: str) -> None:
    """A page could make its own host's name lead to this machine, and read what the server answers."""
    server = serve()
    for path, method in ((CHAT, "POST"), ("/v1/models", "GET")):
        status, _, answer = send(server, chat(), path, method, Host=host)
        assert status == 403 and "LAVIT_API_KEY" in answer["error"]["message"]
    for own in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert send(server, "", "/v1/models", "GET", Host=own)[0] == 200
    with_key = serve(api_key="secret")
    assert send(with_key, "", "/v1/models", "GET", Host=host, Authorization="Bearer secret")[0] == 200


def is_refused(server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), SECONDS).close()
    except ConnectionRefusedError:
        return True
    return False


def in_background(function, *args, **kwargs):
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(function(*args, **kwargs)))
    thread.start()
    return thread, answers


def test_a_full_queue(serve, slow, backend) -> None:
    server = serve(slow, prepare_with=backend, limits={"max_queue": 2}, engine={"max_queue": 2})
    waiting = [in_background(send, server, chat()) for _ in range(2)]
    wait_until(lambda: server.engine.size == 2)
    status, headers, answer = send(server, chat())
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert send(server, "", "/health", "GET")[0] == 200  # which is no work
    with pytest.raises(openai.RateLimitError):
        server.client.chat.completions.create(model=NAME, messages=[HELLO])
    slow.may_go_on.set()
    for thread, answers in waiting:
        thread.join()
        assert answers[0][0] == 200
    assert send(server, chat())[0] == 200
    # More answers of one request than there is room for.
    assert send(server, chat(n=3))[0] == 429


def test_an_answer_frees_its_place_at_once() -> None:
    """Whoever has all of an answer may ask again, even while the application still tidies up after it."""

    async def ask_twice() -> list[int]:
        has_answered, is_tidy, statuses = asyncio.Event(), asyncio.Event(), []

        async def app(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
            await send({"type": "http.response.body", "body": b"2"})
            has_answered.set()
            await is_tidy.wait()

        async def send(message) -> None:
            statuses.append(message.get("status"))

        gate = Gate(app, engine, ServingLimits(max_queue=1), None)
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        first = asyncio.create_task(gate(scope, None, send))
        await has_answered.wait()
        is_tidy.set()
        await gate(scope, None, send)
        await first
        return [status for status in statuses if status]

    engine = Engine(SimpleNamespace(write=None, draw=None))
    assert asyncio.run(ask_twice()) == [200, 200]
    engine.close()
    counted = engine.metrics.registry.get_sample_value("lavit_requests_total", {"path": CHAT, "status": "200"})
    assert counted == 2 and engine.metrics.registry.get_sample_value("lavit_requests_in_flight") == 0


def test_an_answer_that_nobody_takes_ends(monkeypatch) -> None:
    monkeypatch.setattr(serving_app, "_SENDING_SECONDS", 0.05)

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()  # as where a client does not read

    async def ask() -> None:
        scope = {"type": "http", "method": "GET", "path": CHAT, "headers": []}
        await Gate(app, engine, ServingLimits(max_seconds=0.05), None)(scope, None, asyncio.Queue().put)

    engine = Engine(SimpleNamespace(write=None, draw=None))
    asyncio.run(asyncio.wait_for(ask(), 60))
    engine.close()
    assert engine.metrics.registry.get_sample_value("lavit_requests_in_flight") == 0


def test_time_passes(serve, slow, backend) -> None:
    server = serve(slow, prepare_with=backend, limits={"max_seconds": 0.5})
    status, _, answer = send(server, chat())
    assert status == 504 and answer["error"]["code"] == "timeout"
    with pytest.raises(openai.APIError, match="longer than the server allows"):
        list(server.client.chat.completions.create(model=NAME, messages=[HELLO], stream=True))
    wait_until(lambda: server.engine.size == 0)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, IMAGES])
def test_a_client_that_leaves_frees_its_place(serve, slow, backend, is_stream: bool, path: str) -> None:
    server = serve(slow, prepare_with=backend)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    body = chat(stream=is_stream) if path == CHAT else {"prompt": "a cat", "stream": is_stream}
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    assert slow.has_begun.wait(SECONDS)
    assert server.engine.size == 1
    connection.sock.close() if connection.sock else None
    connection.close()
    wait_until(lambda: server.engine.size == 0)  # although it never may go on


def test_a_client_that_leaves_in_the_middle_of_its_request(server) -> None:
    def left() -> float:
        labels = {"path": CHAT, "status": "499"}
        return server.engine.metrics.registry.get_sample_value("lavit_requests_total", labels) or 0

    before = left()
    connection = socket.create_connection(("127.0.0.1", server.port))
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Content-Length: 99",
        "",
        "{",
    ]
    connection.sendall("\r\n".join(lines).encode())
    connection.close()
    wait_until(lambda: left() == before + 1)


def test_the_end_lets_requests_finish(serve, slow, backend) -> None:
    server = serve(slow, prepare_with=backend)
    thread, answers = in_background(send, server, chat())
    assert slow.has_begun.wait(SECONDS)
    server.uvicorn.should_exit = True
    wait_until(lambda: is_refused(server))
    slow.may_go_on.set()
    thread.join()
    assert answers[0][0] == 200
    server.stop()
    assert not server.engine.writer.thread.is_alive() and not server.engine.pixels.thread.is_alive()


def test_a_worker_that_dies_is_an_error_for_its_requests_alone(serve, slow, backend) -> None:
    def die(jobs) -> None:
        slow.draw_with = backend.draw
        raise SystemExit

    slow.draw_with = die
    slow.may_go_on.set()
    server = serve(slow, prepare_with=backend)
    drawing = {"prompt": "a cat", "num_inference_steps": 1}
    status, _, answer = send(server, drawing, IMAGES)
    assert status == 500 and answer["error"]["code"] == "worker_failed"
    assert send(server, drawing, IMAGES)[0] == send(server, chat())[0] == 200


def test_metrics(server) -> None:
    def read() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.getheader("content-type").startswith("text/plain")
        return text

    send(server, chat())
    wait_until(lambda: "lavit_batch_seconds_bucket" in read())  # measured when the batch ends, after the answer
    text = read()
    assert 'lavit_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'lavit_tokens_total{kind="text"}' in text
    send(server, "", "/v1/" + "x" * 50, "GET")
    assert "xxxx" not in read()


def test_nothing_of_a_request_stays(server, images) -> None:
    message = picture_message(data_url(images[0]))
    for body, path in (
        (chat(messages=[message]), CHAT),
        (chat(stream=True), CHAT),
        ({"prompt": "a cat", "num_inference_steps": 1}, IMAGES),
        ({"prompt": "a cat", "size": "7x9"}, IMAGES),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        assert connection.getresponse().read()
        connection.close()

    def kept() -> list:
        gc.collect()
        return [one for one in gc.get_objects() if issubclass(type(one), (Job, Prompt))]

    wait_until(lambda: not kept())
