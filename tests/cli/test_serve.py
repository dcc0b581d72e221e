"""`lavit serve` as a process: it starts, answers, finishes what it has begun, and ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from zygote import Zygote

SRC = Path(__file__).resolve().parents[2] / "src"
SECONDS = 300  # that something may take on a busy machine


@pytest.fixture
def process(random_checkpoint: Path, zygote: Zygote) -> Iterator[subprocess.Popen]:
    command = [zygote.python, "-m", "lavit_cli", "serve", random_checkpoint, "--port", "0", "--name", "tiny"]
    environment = {**os.environ, "LAVIT_API_KEY": "secret"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SRC, env=environment
    )
    yield process
    process.kill()
    process.communicate()


def post(url: str, body: dict) -> HTTPResponse:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=SECONDS)


def test_it_answers_and_finishes_what_it_has_begun(process: subprocess.Popen) -> None:
    line = process.stdout.readline()
    assert line.startswith("Serving tiny at http://127.0.0.1:") and "secret" not in line
    url = line.split()[3]
    message = {"role": "user", "content": "hello"}
    with post(f"{url}/chat/completions", {"model": "tiny", "messages": [message], "max_tokens": 3}) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 3
    drawing = {"prompt": "a cat", "num_inference_steps": 60, "stream": True, "partial_images": 3}
    with post(f"{url}/images/generations", drawing) as answer:
        first = next(line for line in answer if line.startswith(b"event: "))
        assert first == b"event: image_generation.partial_image\n"  # it is at work
        process.send_signal(signal.SIGTERM)
        assert b"event: image_generation.completed\n" in answer.read()
    assert process.wait(SECONDS) in (0, -signal.SIGTERM)
    assert process.stderr.read() == ""


def test_a_port_that_is_taken(lavit, random_checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = lavit("serve", random_checkpoint, "--port", port)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"lavit: error: Cannot listen at 127.0.0.1, port {port}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", " "], "The API key must be"),
        (["--allow-url-prefix", "example.com", "--port", "0"], "'example.com' is no prefix of addresses"),
        (["--host", "no.such.host.invalid"], "Cannot listen at no.such.host.invalid"),
        (["--device", "abacus", "--port", "0"], "--device abacus cannot be used"),
    ],
)
def test_bad_options(lavit, random_checkpoint: Path, arguments: list[str], message: str) -> None:
    result = lavit("serve", random_checkpoint, *arguments)
    assert result.exit_code == 1 and message in result.stderr


def test_a_checkpoint_that_is_not_there(lavit) -> None:
    result = lavit("serve", "no/such/checkpoint/here")
    assert result.exit_code == 1 and "does not exist" in result.stderr


def test_a_checkpoint_that_cannot_draw(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("unet", "vae", "token_decoder", "scheduler", "lowres", "model_index.json")
    shutil.copytree(random_checkpoint, tmp_path / "reader", ignore=left_out)
    result = lavit("serve", tmp_path / "reader", "--port", "0")
    assert result.exit_code == 1
    assert "cannot draw" in result.stderr and "With --text-only it is served all the same." in result.stderr
