"""Real servers on loopback, in threads of this process, and OpenAI's own client."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from PIL import Image

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.pipelines import LavitTextToImagePipeline
from lavit_hf.serving import Engine, ServingLimits, TransformersBackend, create_app

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "lavit-tiny-random"
NAME = "tiny"
SECONDS = 300  # that something may take on a busy machine


@dataclass
class Server:
    """A server that runs."""

    port: int
    engine: Engine
    uvicorn: uvicorn.Server
    thread: threading.Thread

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=SECONDS)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def pipeline() -> LavitTextToImagePipeline:
    """The tiny checkpoint, whole. Do not change it."""
    model = LavitForConditionalGeneration.from_pretrained(TINY).eval()
    processor = ImageTextProcessor.from_pretrained(TINY, visual_tokenizer=model)
    pipeline = LavitTextToImagePipeline.from_pretrained(TINY, model=model, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def backend(pipeline) -> TransformersBackend:
    return TransformersBackend(pipeline.model, pipeline.processor, pipeline)


@contextlib.contextmanager
def running(
    backend: Any, engine: dict[str, Any] | None = None, limits: Any = None, **options: Any
) -> Iterator[Server]:
    """Runs a server as long as the context."""
    made = Engine(backend, **{"window": 0.02, **(engine or {})})
    app = create_app(made, options.pop("prepare_with", backend), NAME, ServingLimits(**(limits or {})), **options)
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started
    found = Server(server.servers[0].sockets[0].getsockname()[1], made, server, thread)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def server(backend) -> Iterator[Server]:
    """A server of the tiny checkpoint that many tests share."""
    with running(backend) as server:
        yield server


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server.client


class Slow:
    """A backend that does not go on before it may."""

    def __init__(self, backend: TransformersBackend):
        self.backend = backend
        self.may_go_on = threading.Event()
        self.has_begun = threading.Event()
        self.draw_with = backend.draw

    def write(self, jobs) -> None:
        self.has_begun.set()
        while not self.may_go_on.wait(0.01) and not all(job.is_over for job in jobs):
            pass
        self.backend.write(jobs)

    def draw(self, jobs) -> None:
        self.draw_with(jobs)


@pytest.fixture
def slow(backend) -> Iterator[Slow]:
    slow = Slow(backend)
    yield slow
    slow.may_go_on.set()


@pytest.fixture
def serve(backend) -> Iterator[Callable[..., Server]]:
    """Starts servers of one's own."""
    with contextlib.ExitStack() as stack:
        yield lambda other=backend, **options: stack.enter_context(running(other, **options))


def data_url(image: Image.Image, picture_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format=picture_format)
    return f"data:image/{picture_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def open_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def picture_message(*urls: str, text: str = "") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.01)
