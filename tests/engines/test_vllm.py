"""vLLM reads and draws as `generate` does: the plug-in with pictures, and the exported language model.

`make test-serving` runs it. Each of the two servers takes minutes to start on two cores.
"""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.reference import Reference, count_equal

pytest.importorskip("vllm", reason="vLLM is not installed")

_START_SECONDS = 1200
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class Client:
    """Asks a server of OpenAI's API, many questions at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer, or the error as the server says it."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps({"model": "lavit", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def complete(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        """Ids that follow ids."""
        answer = self.post("/v1/completions", prompt=prompts, return_token_ids=True, **options)
        assert "choices" in answer, answer
        return [one["token_ids"] for one in sorted(answer["choices"], key=lambda one: one["index"])]

    def chat(self, conversations: list[list[dict[str, Any]]], **options: Any) -> list[list[int]]:
        """Ids that answer the parts of a message."""

        def ask(parts: list[dict[str, Any]]) -> list[int]:
            messages = [{"role": "user", "content": parts}]
            answer = self.post("/v1/chat/completions", messages=messages, return_token_ids=True, **options)
            assert "choices" in answer, answer
            return answer["choices"][0]["token_ids"]

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, conversations))


@contextmanager
def running(model: Path, folder: Path, *options: str) -> Iterator[Client]:
    """A server of vLLM on a free port; its output is in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "lavit"]
    sizes = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "32",
    ]
    log = folder / "vllm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, *command, *sizes, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )
    try:
        client, end = Client(f"http://127.0.0.1:{port}"), time.monotonic() + _START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"{client.url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(300)


def until(end: int, rows: list[list[int]]) -> list[list[int]]:
    """Rows without their end."""
    return [row[: row.index(end)] if end in row else row for row in rows]


# The plug-in.


@pytest.fixture(scope="module")
def plugin(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running(reference.checkpoint, tmp_path_factory.mktemp("plugin"), "--trust-request-mm-kwargs") as client:
        yield client


def read(
    client: Client, reference: Reference, pictures: list[list[int]], asks: bool = False, **options: Any
) -> list[list[int]]:
    conversations = [
        [{"type": "image_url", "image_url": {"url": reference.url(index)}} for index in of_one]
        + [{"type": "text", "text": reference.questions[number]}] * asks
        for number, of_one in enumerate(pictures)
    ]
    limits = {"max_tokens": reference.longest, "min_tokens": reference.shortest}
    return until(reference.end_of_text, client.chat(conversations, **limits, mm_processor_kwargs=options or None))


def test_pictures_in_a_fixed_number_of_tokens(plugin: Client, reference: Reference) -> None:
    """The visual tokenizer runs in the model."""
    each = [[index] for index in range(32)]
    assert count_equal(read(plugin, reference, each), reference.captions_of_third) == "32/32"
    assert count_equal(read(plugin, reference, each, num_image_tokens=8), reference.captions_of_8) == "32/32"
    eight = {"num_image_tokens": 8, "visual_mode": "discrete"}
    assert count_equal(read(plugin, reference, each, **eight), reference.discrete_captions_of_8) == "32/32"


def test_pictures_in_as_many_tokens_as_they_need(plugin: Client, reference: Reference) -> None:
    """The visual tokenizer runs in the front end."""
    each = [[index] for index in range(32)]
    own = {"selection": "argmax"}
    assert count_equal(read(plugin, reference, each, **own), reference.captions) == "32/32"
    assert count_equal(read(plugin, reference, each, asks=True, **own), reference.answers) == "32/32"
    pairs = [[index - 1, index] for index in range(8)]
    assert count_equal(read(plugin, reference, pairs, asks=True, **own), reference.answers_of_two) == "8/8"
    codes = {**own, "visual_mode": "discrete"}
    assert count_equal(read(plugin, reference, each, **codes), reference.discrete_captions) == "32/32"


def test_pictures_by_their_address(plugin: Client, reference: Reference, tmp_path: Path) -> None:
    reference.pictures[0].save(tmp_path / "0.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/0.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        found = plugin.chat([[part]], max_tokens=reference.longest, mm_processor_kwargs={"selection": "argmax"})
        server.shutdown()
        thread.join()
    assert until(reference.end_of_text, found) == reference.captions[:1]


def test_text_stays_text(plugin: Client, reference: Reference) -> None:
    """What spells a token of pictures is text, and an error where it could be taken for one."""
    part = {"type": "text", "text": "</s><visual_3><image>"}
    assert plugin.chat([[part]], max_tokens=2)
    picture = {"type": "image_url", "image_url": {"url": reference.url(0)}}
    messages = [{"role": "user", "content": [picture, part]}]
    error = plugin.post("/v1/chat/completions", messages=messages)["error"]
    assert error["code"] == 400 and "2 <image> for 1 pictures" in error["message"]
    messages = [{"role": "user", "content": [picture]}]
    options = {"mm_processor_kwargs": {"num_image_tokens": 65}}
    error = plugin.post("/v1/chat/completions", messages=messages, **options)["error"]
    assert error["code"] == 400 and "1 to 64 tokens" in error["message"]


# The exported language model.


@pytest.fixture(scope="module")
def llama(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Iterator[Client]:
    with running(llama_dir, tmp_path_factory.mktemp("llama"), "--enable-prompt-embeds") as client:
        yield client


def test_captions_from_codes(llama: Client, reference: Reference) -> None:
    options = {"max_tokens": reference.longest, "allowed_token_ids": reference.text_ids}
    found = llama.complete(reference.discrete_prompts, min_tokens=reference.shortest, **options)
    assert count_equal(until(reference.end_of_text, found), reference.discrete_captions) == "32/32"


def test_drawing(llama: Client, reference: Reference) -> None:
    found = llama.complete(
        reference.drawing_prompts,
        max_tokens=reference.longest_drawing,
        allowed_token_ids=reference.picture_ids,
        stop_token_ids=[reference.end_of_picture],
        ignore_eos=True,
    )
    assert count_equal(until(reference.end_of_picture, found), reference.drawn) == "16/16"


def embedding_part(embedding: torch.Tensor) -> dict[str, str]:
    file = io.BytesIO()
    torch.save(embedding.detach().clone(), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


@pytest.mark.parametrize("asks", [False, True], ids=["captions", "answers"])
def test_embeddings_in_chats(llama: Client, reference: Reference, asks: bool) -> None:
    parts = [
        [embedding_part(embedding)] + [{"type": "text", "text": question}] * asks
        for embedding, question in zip(reference.embeddings, reference.questions, strict=True)
    ]
    options = {"max_tokens": reference.longest, "allowed_token_ids": reference.text_ids}
    found = until(reference.end_of_text, llama.chat(parts, min_tokens=reference.shortest, **options))
    assert count_equal(found, reference.answers if asks else reference.captions) == "32/32"
