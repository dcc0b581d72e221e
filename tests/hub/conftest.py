"""A Hub on this machine, and clients of it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub.hub_server import TOKEN, HubServer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "lavit-tiny-random"

# Runs code against the Hub: `client(code, *arguments)`; `token=None` is not logged in.
Client = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty Hub."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Runs Python code in a process that knows this Hub, with a cache that is empty at the beginning of the test."""

    def run(code: str, *arguments: object, token: str | None = TOKEN, home: str = "home", check: bool = True):
        environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HOME")}
        environment |= hub.environment(tmp_path / home, token)
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0 or not check, result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The checkpoint in the repository."""
    return CHECKPOINT
